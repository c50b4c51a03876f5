"""Does a checkpoint of CLAP2Diffusion listen?

    python -m jobs.clap_evaluate CONFIG [--run-dir DIR]

Paired losses on the fixed grid, the same with all gates at several values, and pictures generated from unseen sounds:
what class they show, beside pictures from the sounds of another class. Artifacts: evaluation.json and pictures.png.
"""
from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.clap import ClapEvaluateRun
from configs.load import read_run
from jobs.clap_train import data_folder, set_caches
from jobs.runtime import job_by_hand, job_from_environment, run_job
from jobs.start import with_found

if TYPE_CHECKING:
    from jobs.clap_encoders import Judge
    from jobs.data.clips import Clip, Clips

EVALUATION, PICTURES = "evaluation.json", "pictures.png"
_TEMPLATES = 512  # training items at most, for the class templates
_SHOWN = 12  # pictures in a row


def main() -> None:
    parser = argparse.ArgumentParser(prog="python -m jobs.clap_evaluate", description="Does a checkpoint listen?")
    parser.add_argument("config", type=Path, help="a run file (configs/runs/clap-evaluate/*.yaml)")
    parser.add_argument("--run-dir", help="where to write; default: runs/clap-evaluate-by-hand-<time>")
    given = parser.parse_args()
    config = with_found(read_run(given.config, ClapEvaluateRun), "data", "checkpoint", "base_model", "clap_model",
                        "hub_cache", "image_encoder")
    set_caches(config.hub_cache, config.base_model, config.clap_model)
    Evaluation(config).run(given.run_dir)


class Evaluation:
    """One evaluation: `run()` once."""

    def __init__(self, config: ClapEvaluateRun) -> None:
        """Raises JobError."""
        from jobs.clap_pictures import Painter
        from jobs.clap_validation import Grid
        from jobs.data.clips import check_files, read_clips, spread
        from jobs.world import World

        self._config = config
        root = data_folder(config.data)
        held = spread(read_clips(root, config.split), config.grid.max_items)
        train = spread(read_clips(root, "train"), _TEMPLATES)
        check_files([*held, *train])
        self._painter = Painter(Path(config.checkpoint), config.base_model, config.clap_model, config.precision)
        self._held, self._train = self._clips(held), self._clips(train)
        alone = World(0, 1, self._painter.device)
        self._grid = Grid(self._painter.loaded, self._held, config.grid, config.precision == "bf16", alone)

    def _clips(self, clips: list[Clip]) -> Clips:
        from jobs.data.clips import Clips

        loaded = self._painter.loaded
        recipe = loaded.about.recipe
        return Clips(clips, recipe.rate, recipe.seconds, loaded.about.image_size, self._config.seed,
                     loaded.conditioning.mel)

    def run(self, run_dir: str | None) -> None:
        config, began = self._config, time.monotonic()
        job = (None if run_dir else job_from_environment(None)) or job_by_hand("clap-evaluate", run_dir, None)
        artifacts = job.run.artifacts
        artifacts.mkdir(parents=True, exist_ok=True)
        found: dict[str, Any] = {"checkpoint": config.checkpoint, "stage": self._painter.loaded.about.stage,
                                 "split": config.split, "items": len(self._held)}
        found["grid"] = self._losses()
        found["gate_sweep"] = self._sweep()
        found |= self._pictures(artifacts / PICTURES)
        found["bars"] = self._bars(found)
        (artifacts / EVALUATION).write_text(json.dumps(found, indent=1))
        print(f"evaluated in {time.monotonic() - began:.0f} s; {artifacts / EVALUATION}")
        sys.stdout.flush()

    # --- losses -----------------------------------------------------------------------------------------------------

    def _losses(self) -> dict[str, float]:
        from jobs.clap_validation import in_words

        found = self._grid.evaluate(lambda: False)
        assert found is not None
        print(f"{len(self._held)} items of {self._config.split}: matched {found['val/matched']:.5f}, shuffled "
              f"{found['val/shuffled']:.5f}, null {found['val/null']:.5f}")
        print("\n".join(in_words(found)), flush=True)
        return found

    def _sweep(self) -> list[dict[str, float]]:
        from jobs.clap_validation import summary
        from models.audio_attention import FixedGates

        rows = []
        for gate in self._config.gates:
            with FixedGates(self._painter.loaded.frozen.unet, gate):
                table = self._grid.losses()
            assert table is not None
            rows.append({"gate": gate, **summary(table, self._config.grid.resamples, self._config.grid.seed)})
            print(f"gates {gate:4.2f}: matched {rows[-1]['val/matched']:.5f}, shuffled - matched "
                  f"{rows[-1]['val/gap']:+.5f}, null - matched {rows[-1]['val/null_gap']:+.5f}", flush=True)
        return rows

    # --- pictures ---------------------------------------------------------------------------------------------------

    def _pictures(self, sheet: Path) -> dict[str, Any]:
        """Generated from matched and from shuffled sounds, judged. Nothing for data without labels."""
        from jobs.clap_pictures import save_rows, seeds_of
        from jobs.clap_validation import bootstrap, other_sounds

        config, clips = self._config, self._held.clips
        count = min(len(clips), config.max_pictures or len(clips))
        labels = [clip.label for clip in clips[:count]]
        named = [label for label in labels if label is not None]
        classes = sorted({clip.label for clip in self._train.clips if clip.label is not None})
        if len(named) < count or not set(named) <= set(classes):
            print("no pictures are judged: not every item has a class that the training data knows")
            return {}
        judge = self._judge(classes)
        embeddings, seeds = self._grid.embeddings[:count], seeds_of(config.seed, count)
        shuffled = embeddings[other_sounds(labels, config.seed)]
        truth = self._held.pictures(range(count)).float() / 255
        found: dict[str, Any] = {"judge": judge.name, "chance": 1 / len(classes), "guidance": []}
        rows = [truth[:_SHOWN]]
        for guidance in config.sampling.guidance:
            pictures = self._paint(embeddings, guidance, seeds)
            rows.append(pictures[:_SHOWN])
            control = self._paint(shuffled, guidance, seeds)
            right = [classes[best] == label for best, label in zip(judge.pictures(pictures).argmax(1).tolist(), labels)]
            wrong = [classes[best] == label for best, label in zip(judge.pictures(control).argmax(1).tolist(), labels)]
            entry = {"guidance": guidance, "accuracy": _interval(right, bootstrap, config),
                     "accuracy_shuffled": _interval(wrong, bootstrap, config),
                     "scores": self._scores(judge, embeddings, pictures, truth),
                     "scores_shuffled": self._scores(judge, embeddings, control, truth)}
            found["guidance"].append(entry)
            print("\n".join(_words(entry, found["chance"])), flush=True)
        save_rows(sheet, rows)
        return found

    def _judge(self, classes: list[str]) -> Judge:
        import torch

        from jobs.clap_encoders import Clip, Templates
        from jobs.loader import Draw

        indices = range(len(self._train))
        conditioning = self._painter.loaded.conditioning
        embeddings = torch.cat([conditioning.embed(self._train.batch([Draw(0, index)]).features).cpu()
                                for index in indices])
        given = (self._train.pictures(indices).float() / 255, embeddings,
                 [str(clip.label) for clip in self._train.clips], classes)
        if self._config.image_encoder:
            return Clip(Path(self._config.image_encoder), *given, self._painter.device)
        return Templates(*given)

    def _paint(self, embeddings: Any, guidance: float, seeds: list[int]) -> Any:
        import torch

        sampling, batch = self._config.sampling, self._config.batch
        return torch.cat([
            self._painter.paint(embeddings[first:first + batch], "", "", sampling.steps, guidance,
                                sampling.audio_strength, seeds[first:first + batch])
            for first in range(0, len(embeddings), batch)])

    def _scores(self, judge: Judge, embeddings: Any, pictures: Any, truth: Any) -> dict[str, dict[str, float]]:
        from jobs.clap_metrics import scores

        grid = self._config.grid
        return scores(judge.sounds(embeddings.cpu()), judge.pictures(pictures), judge.pictures(truth), grid.resamples,
                      grid.seed)

    # --- verdict ----------------------------------------------------------------------------------------------------

    def _bars(self, found: dict[str, Any]) -> list[dict[str, Any]]:
        """What is held against what, printed."""
        grid, wanted = found["grid"], self._config.bars
        bars = [("shuffled - matched, 5 % bound", grid["val/gap_low"], 0.0),
                ("null - matched, 5 % bound", grid["val/null_gap_low"], 0.0),
                ("win rate over shuffled", grid["val/win"], wanted.win_shuffled),
                ("win rate over null", grid["val/null_win"], wanted.win_null)]
        if found.get("guidance"):
            strongest = max(found["guidance"], key=lambda entry: entry["guidance"])
            bars.append((f"class accuracy at guidance {strongest['guidance']:g}", strongest["accuracy"]["value"],
                         wanted.accuracy))
        rows = [{"what": what, "value": value, "bar": bar, "reached": value > bar or (bar > 0 and value == bar)}
                for what, value, bar in bars]
        for row in rows:
            print(f"{'reached' if row['reached'] else 'NOT reached':11} {row['what']}: {row['value']:.4g} "
                  f"({'above' if row['bar'] == 0 else 'at least'} {row['bar']:g})")
        return rows


def _interval(hits: list[bool], bootstrap: Any, config: ClapEvaluateRun) -> dict[str, float]:
    import numpy as np

    found = bootstrap(np.array(hits, dtype=float), config.grid.resamples, config.grid.seed)
    return {"value": found.mean, "low": found.low, "high": found.high}


def _words(entry: dict[str, Any], chance: float) -> list[str]:
    own, other = entry["accuracy"], entry["accuracy_shuffled"]
    lines = [f"guidance {entry['guidance']:g}: class accuracy {own['value']:.2f} ({own['low']:.2f}-{own['high']:.2f}), "
             f"chance {chance:.2f}; from another class's sounds {other['value']:.2f}"]
    told = [f"{name} {value['value']:.2f}|{entry['scores_shuffled'][name]['value']:.2f}"
            + (f" (chance {value['chance']:.2f})" if "chance" in value else "")
            for name, value in entry["scores"].items()]
    return [*lines, f"  matched|shuffled: {', '.join(told)}"]


if __name__ == "__main__":
    run_job(main, 0)
