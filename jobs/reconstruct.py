"""Reconstruct: one picture through phase 1 and phase 3 to 3D Gaussians.

    python -m jobs.reconstruct CONFIG [--run-dir DIR]

    artifacts/views/00_front.png …   what the generator makes of the picture
    artifacts/gaussians.ply          what the reconstructor makes of the views
    artifacts/renders/00_front.png … the Gaussians seen by the rig's cameras
    artifacts/turntable.mp4          or .gif where there is no encoder
    artifacts/metrics.json           with `truth`: PSNR of the true views that were not put in, beside what is cheap
"""
from __future__ import annotations

import argparse
import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

from configs.reconstruct import ReconstructRun
from jobs import bars
from jobs.runtime import Job, JobError, StopFlag, run_job
from jobs.start import find_list, find_path, open_job, run_stage, with_found

if TYPE_CHECKING:  # torch takes a second: a mistake in the config is told before it is imported
    from torch import Tensor

    from jobs.metrics import Metrics
    from jobs.mv_generator import ViewGenerator
    from jobs.reconstructor import Reconstructor
    from jobs.world import World
    from models.gaussians import Gaussians

INPUT, VIEWS, RENDERS, PLY, METRICS = "input.png", "views", "renders", "gaussians.ply", "metrics.json"
_STEPS = 4  # views, Gaussians and renders, turntable, metrics


def main() -> None:
    run_stage("reconstruct", "One picture to six views to 3D Gaussians.", ReconstructRun, _reconstruct)


def _reconstruct(config: ReconstructRun, given: argparse.Namespace, world: World, stop: StopFlag) -> None:
    """Check everything, then make the run directory, then work: a bad input leaves nothing behind."""
    from jobs.fitting import fitted
    from jobs.metrics import Metrics
    from jobs.mv_generator import Interrupted, load_generator
    from jobs.reconstructor import check_rigs, load_reconstructor

    config = _with_found_paths(config)
    if world.size > 1:
        raise JobError(f"{world.size} ranks for one picture", "start it without torchrun: python -m jobs.reconstruct")
    generator = load_generator(config.generator, world)
    _check_renderer(world)
    reconstructor = load_reconstructor(config.reconstructor, world.device)
    check_rigs(config.generator.checkpoint, generator.rig, reconstructor)
    picture, how = fitted(Path(config.input_image), generator.size, generator.background, config.fit)
    truth = _truth(config, generator, reconstructor.size)
    metrics = Metrics(_STEPS)
    job = open_job("reconstruct", config, given, world)
    metrics.open(job.attempt.metrics)
    metrics.say(f"{config.input_image}: {how}")
    metrics.say(f"generator: {config.generator.checkpoint}, weights {config.generator.weights}, "
                f"{config.generator.steps} steps; reconstructor: {config.reconstructor.checkpoint}")
    generator.stop_when(lambda: stop.asked)
    work = Work(config, generator, reconstructor, picture, truth, job, metrics)
    try:
        for step, part in enumerate((work.views, work.gaussians, work.turntable, work.metrics), 1):
            metrics.write(step, **(part() or {}))
        metrics.write(_STEPS, "done")
        metrics.say(f"done: artifacts in {job.run.artifacts}")
    except Interrupted:
        metrics.write(0, "stopped")
        metrics.say("stopped as asked; a restart begins anew")
    finally:
        metrics.close()


def _with_found_paths(config: ReconstructRun) -> ReconstructRun:
    import msgspec

    config = with_found(config, "input_image", "truth")
    if config.mean_of:
        config = msgspec.structs.replace(config, mean_of=find_list(config.mean_of, "data_train.txt"))
    return msgspec.structs.replace(
        config, generator=with_found(config.generator, "checkpoint", "rig_of", "prompt_embeds"),
        reconstructor=msgspec.structs.replace(config.reconstructor,
                                              checkpoint=find_path(config.reconstructor.checkpoint)))


def _check_renderer(world: World) -> None:
    from models.gaussians import RenderError, load_gsplat

    if world.device.type == "cuda":
        try:
            load_gsplat()
        except RenderError as error:
            raise JobError(f"rendering: {error}") from None


def _truth(config: ReconstructRun, generator: ViewGenerator, size: int) -> Tensor | None:
    """The true views [V, 3, size, size] in 0..1. Raises JobError when another rig took them."""
    from jobs.data.multiview import read_pixels
    from jobs.data.rigs import rig_of
    from jobs.data.samples import read_sample
    from models import rigs

    if config.truth is None:
        return None
    folder = Path(config.truth)
    sample = read_sample(folder.name, folder)
    rig = rig_of(sample)
    if rig.fingerprint != generator.rig.fingerprint:
        raise JobError("truth: its views are not those that are made: "
                       + rigs.mismatch("the generator", generator.rig, f"the sample {folder}", rig),
                       "name a sample of the generator's rig, or leave `truth` out")
    return read_pixels(sample, size, generator.background)[:, :3].float() / 255


class Work:
    """The four parts, each leaving its artifacts."""

    def __init__(self, config: ReconstructRun, generator: ViewGenerator, reconstructor: Reconstructor, picture: Tensor,
                 truth: Tensor | None, job: Job, metrics: Metrics) -> None:
        self._config, self._generator, self._reconstructor = config, generator, reconstructor
        self._picture, self._truth, self._out, self._metrics = picture, truth, job.run.artifacts, metrics
        self._out.mkdir(parents=True, exist_ok=True)

    def views(self) -> None:
        self._views = self._generated(self._generator)
        self._save_views(VIEWS, self._views)
        _save(self._picture, self._out / INPUT)

    def gaussians(self) -> None:
        from models.gaussians import save_ply

        self._gaussians = self._reconstructor.gaussians(self._views, self._generator.rig)
        save_ply(self._out / PLY, self._gaussians)
        self._renders = self._rendered(self._gaussians)
        self._save_views(RENDERS, self._renders)

    def turntable(self) -> None:
        from jobs.turntable import save_turntable

        config = self._config.turntable
        if config.frames:
            path, why = save_turntable(self._gaussians, config, config.size or self._reconstructor.size,
                                       self._generator.background, self._out)
            self._metrics.say(f"{path.name}: {config.frames} frames" + (f" (no mp4: {why})" if why else ""))

    def metrics(self) -> dict[str, float]:
        """Nothing without the truth."""
        if self._truth is None:
            return {}
        found = compared(self._truth, self._generator.reference, self._guesses(self._truth))
        (self._out / METRICS).write_text(json.dumps(found, indent=1))
        psnr = found["psnr"]
        self._metrics.say("PSNR of the true views that were not put in: "
                          + "  ".join(f"{name} {value:.2f}" for name, value in psnr.items()))
        for line in bars.told(found["bars"]):
            self._metrics.say(line)
        return {f"val/psnr_{name}": value for name, value in psnr.items()}

    def _guesses(self, truth: Tensor) -> dict[str, Tensor]:
        """What stands beside the reconstruction: [V, 3, S, S] each."""
        import torch

        from jobs.data.multiview import MultiView, ViewChoice, find_samples
        from jobs.heldout import mean_images
        from jobs.world import World

        size, rig = truth.shape[-1], self._generator.rig
        fresh = self._reconstructor.untrained().gaussians(self._generated(self._generator.untrained()), rig)
        picture = torch.nn.functional.interpolate(self._picture[None], (size, size), mode="bicubic", antialias=True)
        found = {"chain": self._renders, "generated": _resized(self._views, size),
                 "copy": picture.clamp(0, 1).expand_as(truth), "white": torch.ones_like(truth),
                 "untrained": self._rendered(fresh)}
        if self._config.mean_of is not None:
            alone = World(0, 1, torch.device("cpu"))
            samples = find_samples(Path(self._config.mean_of), "error", alone, len(truth)).samples
            choice = ViewChoice(len(truth), "all", False)
            found["mean"] = mean_images(MultiView(samples, size, self._generator.background, choice, 0, 1), alone)
        return found

    def _generated(self, generator: ViewGenerator) -> Tensor:
        """[V, 3, S, S] in 0..1 on the CPU."""
        return generator.views(self._picture[None], [self._config.generator.seed])[0].cpu()

    def _rendered(self, gaussians: Gaussians) -> Tensor:
        from jobs.reconstructor import rendered

        size = self._reconstructor.size
        rig = self._generator.rig.resized(size, size)
        return rendered(gaussians, rig.c2w, rig.fxfycxcy, size, self._generator.background)

    def _save_views(self, folder: str, views: Tensor) -> None:
        (self._out / folder).mkdir(exist_ok=True)
        for number, (name, view) in enumerate(zip(self._generator.rig.names, views)):
            _save(view, self._out / folder / f"{number:02d}_{name}.png")


def compared(truth: Tensor, reference: int, guesses: dict[str, Tensor]) -> dict[str, Any]:
    """PSNR and SSIM of each guess [V, 3, S, S] over the true views but the one that was put in, and the bars that
    the chain must clear."""
    from models.losses import SSIM_WINDOW, image_psnr, image_ssim

    others = [view for view in range(len(truth)) if view != reference]
    psnr = {name: image_psnr(guess[others], truth[others]).mean().item() for name, guess in guesses.items()}
    ssim = {name: image_ssim(guess[others], truth[others]).mean().item() for name, guess in guesses.items()} \
        if truth.shape[-1] >= SSIM_WINDOW else {}
    against = {bars.COPY: psnr["copy"], bars.WHITE: psnr["white"], "the untrained chain": psnr["untrained"]}
    return {"views": len(others), "psnr": psnr, "ssim": ssim, "bars": bars.bars(psnr["chain"], against)}


def _resized(views: Tensor, size: int) -> Tensor:
    from torch.nn.functional import interpolate

    if views.shape[-1] == size:
        return views
    return interpolate(views, (size, size), mode="bicubic", antialias=True).clamp(0, 1)


def _save(picture: Tensor, path: Path) -> None:
    """RGB [3, S, S] in 0..1 as PNG."""
    from PIL import Image

    Image.fromarray((picture * 255).round().byte().permute(1, 2, 0).contiguous().numpy()).save(path)


if __name__ == "__main__":
    run_job(main, int(os.environ.get("RANK", 0)))
