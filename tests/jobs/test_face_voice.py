"""Face-voice matching as a person runs it: one batch over all ranks, an exact resume, what is refused."""
from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file

from cluster.contract import RunDir, list_checkpoints, merged_metrics
from jobs.data import identities
from tests.helpers import TIMES
from tests.jobs.conftest import Start
from tests.jobs.small_face_voice import config_of


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("people") / "data"
    identities.make(out, 20, 3, 16, 8000, 0)
    return out


def run(start: Start, path: Path, config: dict, ranks: int = 1, attempt: int = 0, resume: Path | None = None,
        module: str = "tests.jobs.small_face_voice", argv: tuple[str, ...] = ()) -> list[int]:
    file = path.with_suffix(".json")
    file.write_text(json.dumps(config))
    RunDir(path).attempt(attempt).path.mkdir(parents=True)
    return start(path, ranks, attempt, resume, module=module, argv=[str(file), *argv])


def output(path: Path) -> str:
    return "\n".join(one.read_text() for one in sorted(path.parent.glob(f"{path.name}.out.*")))


def steps_of(path: Path) -> list[dict[str, Any]]:
    return [{key: value for key, value in line.items() if key not in TIMES}
            for line in merged_metrics(RunDir(path)) if "event" not in line]


def at_step(path: Path, step: int, attempt: int = 0) -> Path:
    return RunDir(path).checkpoints / f"step-{step:08d}-a{attempt:03d}"


@pytest.fixture(scope="module")
def finished(start: Start, data: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two ranks; the rate falls on a plateau, so that what validation has decided is in the checkpoint too."""
    path = tmp_path_factory.mktemp("finished") / "run"
    plateau = {"schedule": {"warmup": 2, "decay": "plateau", "plateau_patience": 1, "stop_patience": 9}}
    assert run(start, path, config_of(data, **plateau), 2) == [0, 0], output(path)
    return path


def test_a_run_says_what_guessing_is_and_leaves_its_report(finished: Path) -> None:
    said = output(finished)
    assert f"batch: 8 pairs, 4 on each of 2 ranks; guessing has the loss ln(8) = {math.log(8):.4f}" in said
    assert "identities: train 12, validation 4, test 4, seen-heard 12" in said
    assert "unseen-unheard: 4 identities" in said and "seen-heard: 12 identities" in said
    made = {path.name for path in RunDir(finished).artifacts.iterdir()}
    assert made == {"evaluation.txt", "evaluation.json", "roc.png", "n_way.png", "similarities.png", "report.json"}
    evaluations = [line for line in merged_metrics(RunDir(finished)) if line.get("event") == "eval"]
    assert [line["step"] for line in evaluations] == [0, 4, 8]
    assert all(line["val/match_chance"] == 0.5 and 0 <= line["val/eer"] <= 1 for line in evaluations)


def test_the_temperature_is_in_the_optimizer_and_moves(finished: Path) -> None:
    first, last = (load_file(at_step(finished, step) / "model.safetensors") for step in (4, 8))
    moments = load_file(at_step(finished, 8) / "optimizer.safetensors")
    assert moments["heads.log_scale.exp_avg"].item() != 0
    assert first["heads.log_scale"] != last["heads.log_scale"]
    scales = [line["scale"] for line in steps_of(finished)]
    assert scales[0] == pytest.approx(14.2857, abs=1e-3) and len(set(scales)) > 4


def test_a_resume_is_exact(finished: Path, start: Start, data: Path, tmp_path: Path) -> None:
    """With loader state, dropout, the plateau and the temperature: bit for bit."""
    path = tmp_path / "run"
    config = json.loads(finished.with_suffix(".json").read_text())
    assert run(start, path, config, 2, resume=at_step(finished, 4)) == [0, 0], output(path)
    assert steps_of(path) == steps_of(finished)[4:]
    for file in ("model", "optimizer"):
        expected, found = (load_file(at_step(one, 8) / f"{file}.safetensors") for one in (finished, path))
        assert all(torch.equal(found[name], expected[name]) for name in expected)
    progress = [json.loads((at_step(one, 8) / "state.json").read_text())["progress"] for one in (finished, path)]
    assert progress[0] == progress[1]


def test_two_ranks_are_one_rank_with_the_whole_batch(start: Start, data: Path, tmp_path: Path) -> None:
    """Without the gather each rank would compare four pairs and not eight."""
    paths = [tmp_path / f"ranks{ranks}" for ranks in (1, 2)]
    for ranks, path in enumerate(paths, 1):
        assert run(start, path, config_of(data, dropout=0.0, max_steps=1), ranks) == [0] * ranks, output(path)
    (one,), (two,) = map(steps_of, paths)
    for name in ("loss", "grad_norm", "accuracy", "face_std", "voice_cosine"):
        assert two[name] == pytest.approx(one[name], abs=1e-5), name
    # after one update the first moment is a tenth of the (clipped) gradient
    gradients = [{name: 10 * tensor for name, tensor in load_file(at_step(path, 1) / "optimizer.safetensors").items()
                  if name.endswith("exp_avg")} for path in paths]
    assert len(gradients[0]) > 20 and max(one.abs().max() for one in gradients[0].values()) > 1e-2
    for name, expected in gradients[0].items():
        torch.testing.assert_close(gradients[1][name], expected, atol=1e-5, rtol=0, msg=name)


def test_a_checkpoint_is_evaluated_as_its_training_did(finished: Path, start: Start, data: Path, tmp_path: Path) -> None:
    evaluation = {"evaluation": {"trials": 300, "bootstrap": 20}}
    path = tmp_path / "eval"
    codes = run(start, path, evaluation, resume=at_step(finished, 8), module="jobs.face_voice_eval")
    assert codes == [0], output(path)
    for name in ("evaluation.json", "roc.png"):
        there, here = (RunDir(one).artifacts / name for one in (finished, path))
        assert here.read_bytes() == there.read_bytes()
    assert list(merged_metrics(RunDir(path)))[-1]["event"] == "done"
    refused = tmp_path / "refused"
    asked = evaluation | {"data": {"voxceleb": str(data)}}
    assert run(start, refused, asked, resume=at_step(finished, 8), module="jobs.face_voice_eval") == [2]
    assert "data: 12 of 20 identities are trained on too" in output(refused)
    allowed = tmp_path / "allowed"
    assert run(start, allowed, asked, resume=at_step(finished, 8), module="jobs.face_voice_eval",
               argv=("--allow-overlap",)) == [0], output(allowed)


def test_the_heads_alone_are_trained_on_features_that_are_kept(start: Start, data: Path, tmp_path: Path) -> None:
    path = tmp_path / "frozen"
    config = config_of(data, "all") | {"features": {"directory": str(tmp_path / "features")}}
    assert run(start, path, config, 2) == [0, 0], output(path)
    assert "features of 60 files: 0 are there, 60 to make" in output(path)
    assert "note: a tower is random and frozen" in output(path)
    names = load_file(at_step(path, 8) / "model.safetensors").keys()
    assert all(name.startswith("heads.") for name in names)
    again = tmp_path / "again"
    assert run(start, again, config, 2, resume=at_step(path, 4)) == [0, 0], output(again)
    assert "features of 60 files: 60 are there, 0 to make" in output(again)
    assert steps_of(again) == steps_of(path)[4:]
    codes = run(start, tmp_path / "eval", {"evaluation": {"trials": 300, "bootstrap": 20}}, resume=at_step(path, 8),
                module="jobs.face_voice_eval")
    assert codes == [0], output(tmp_path / "eval")
    assert (tmp_path / "eval/artifacts/evaluation.txt").read_text() == (path / "artifacts/evaluation.txt").read_text()
    other = config_of(data, "all", seed=1)
    assert run(start, tmp_path / "other", other, resume=at_step(path, 4)) == [2]
    assert "its face tower is" in output(tmp_path / "other")


@pytest.mark.parametrize(("ranks", "change", "said"), [
    (2, {"batch": 7}, "training.batch: 7 pairs cannot be divided over 2 ranks"),
    (1, {"batch": 64}, "training.batch: 64 pairs, but there are only 24 to train on")])
def test_the_batch_is_never_changed(start: Start, data: Path, tmp_path: Path, ranks: int, change: dict, said: str) -> None:
    path = tmp_path / "run"
    assert run(start, path, config_of(data, **change), ranks) == [2] * ranks
    assert said in output(path) and "it is never changed by itself" in output(path).replace("the batch", "it")
    assert not list_checkpoints(RunDir(path).checkpoints) if RunDir(path).checkpoints.exists() else True


def test_people_on_both_sides_are_refused_before_anything_is_made(start: Start, data: Path, tmp_path: Path) -> None:
    config = config_of(data)
    config["data"] |= {"val": {"voxceleb": str(data)}, "test": {"voxceleb": str(data)}}
    assert run(start, tmp_path / "run", config) == [2]
    assert "data.val: 20 of 20 identities are trained on too" in output(tmp_path / "run")
    assert not (tmp_path / "run/artifacts").exists()
    config["training"] |= {"max_steps": 2, "accumulation": 2, "precision": "bf16"}
    allowed = tmp_path / "allowed"
    assert run(start, allowed, config, argv=("--allow-overlap",)) == [0], output(allowed)
    assert "data.test: 20 of 20 identities are trained on too" in output(allowed) and "(allowed)" in output(allowed)


def test_a_bad_file_ends_all_ranks_with_its_name(start: Start, data: Path, tmp_path: Path) -> None:
    """Also the rank that would wait in the gather for the one without a batch."""
    import shutil

    shutil.copytree(data, tmp_path / "data")
    for path in (tmp_path / "data").rglob("faces/*.png"):
        path.write_bytes(path.read_bytes()[:200])  # the head is whole: found when it is read
    config = config_of(tmp_path / "data", validation={"every_steps": 4, "trials": 100})
    assert run(start, tmp_path / "run", config, 2) == [2, 2]
    assert ".png cannot be read as a picture" in output(tmp_path / "run")
    assert "Traceback" not in output(tmp_path / "run")
