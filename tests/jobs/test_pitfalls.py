"""What other code was seen to do wrong where nothing else here would notice: failures that looked like success."""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import msgspec
import pytest
import torch

from cluster.contract import RunDir, read_json_lines
from configs.phase3 import Phase3Run
from jobs import phase1
from jobs.data.samples import BadSample, read_sample
from jobs.data.toy import make
from jobs.gslrm_stage import PictureLoss, build_model
from jobs.loader import Draw
from jobs.metrics import Metrics
from jobs.runtime import AgreedError, Job, JobError, StopFlag
from jobs.trainer import REPORT, Trainer
from jobs.world import World
from models.cameras import mv6
from tests.jobs.conftest import Start
from tests.jobs.small_stage import Numbers, SmallStage, small_plan
from tests.jobs.test_phase3 import config_of, phase3


@pytest.fixture(scope="module")
def data(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two training samples, and one for validation: fewer than a batch."""
    out = tmp_path_factory.mktemp("toy") / "data"
    make(out, 2, 1, 16, 0)
    return out


def train(stage: SmallStage, job: Job, world: World) -> list[dict]:
    plan = small_plan(total=8, accumulation=1)
    metrics = Metrics(plan.total)
    metrics.open(job.attempt.metrics)
    Trainer(stage, plan, world, job, metrics, StopFlag()).run()
    return list(read_json_lines(job.attempt.metrics))


class GoesBad(Numbers):
    """One of its samples cannot be read any more once training runs."""

    def batch(self, draws: list[Draw]) -> dict[str, Any]:
        if any(draw.step >= 4 and draw.index % 2 for draw in draws):
            raise BadSample("mouse_7", "images/cam_003.png", "cannot be decoded", "export it again")
        return super().batch(draws)


def test_a_sample_that_goes_bad_ends_the_run_and_is_never_replaced_by_another(alone: World, job: Job) -> None:
    stage = SmallStage()
    stage.source = GoesBad()
    with pytest.raises(AgreedError, match="mouse_7: images/cam_003.png: cannot be decoded") as caught:
        train(stage, job, alone)
    assert caught.value.error.exit_code == 2


class Broken(SmallStage):
    def evaluate(self, step: int, stop_asked: Callable[[], bool]) -> dict[str, float] | None:
        if step:
            raise ValueError("the validation is broken")
        return super().evaluate(step, stop_asked)


def test_an_error_of_the_validation_ends_the_run_and_is_no_zero(alone: World, job: Job) -> None:
    with pytest.raises(ValueError, match="the validation is broken"):
        train(Broken(), job, alone)
    lines = list(read_json_lines(job.attempt.metrics))
    assert [line["step"] for line in lines if line.get("event") == "eval"] == [0]
    assert not any(line.get("event") == "done" for line in lines) and not (job.run.artifacts / REPORT).exists()


def test_a_crash_of_one_rank_ends_the_others_instead_of_leaving_them_at_a_barrier(start: Start, tmp_path: Path) -> None:
    codes = start(tmp_path / "run", 2, fault="RAISE:1:7")
    assert 0 not in codes
    assert "planned at pass 7" in (tmp_path / "run.out.1").read_text()


def test_weights_that_are_not_finite_end_the_process_with_its_own_exit_code(data: Path, tmp_path: Path) -> None:
    config = config_of(data, max_steps=40, max_consecutive_skips=3, schedule={"warmup": 0},
                       optimizer={"lr": 1e30, "grad_clip": 1.0})
    done = phase3(tmp_path, config, "--run-dir", "run")
    assert done.returncode == 3
    assert "3 updates in a row were skipped" in done.stderr and "Traceback" not in done.stderr
    assert not (tmp_path / "run/artifacts/report.json").exists()


def test_a_validation_set_smaller_than_the_batch_is_not_empty(data: Path, tmp_path: Path) -> None:
    config = config_of(data, max_steps=1, batch_per_rank=4)
    assert phase3(tmp_path, config | {"turntable_frames": 0}, "--run-dir", "run").returncode == 0
    [*_, last] = (line for line in read_json_lines(RunDir(tmp_path / "run").attempt(0).metrics)
                  if line.get("event") == "eval")
    assert last["val/images"] == 6 and last["val/psnr"] > 0


def test_a_white_picture_still_teaches(data: Path) -> None:
    """Everything brighter than white: a rendering that was clamped before the loss would have no gradient at all."""
    config = msgspec.convert(config_of(data), Phase3Run)
    sample = read_sample("s", data / "sample_000000")
    c2w, fxfycxcy = sample.c2w()[None], sample.fxfycxcy(16)[None]
    drawn = build_model(config)(torch.rand(1, 6, 3, 16, 16), c2w, fxfycxcy)
    white = replace(drawn.map(lambda field: field.detach()), sh=torch.full_like(drawn.sh, 4.0))
    bright = white.map(lambda field: field.requires_grad_())
    dark = torch.zeros(1, 6, 3, 16, 16)
    loss, _ = PictureLoss(config, torch.device("cpu")).deferred(bright, dark, dark[:, :, :1], c2w, fxfycxcy, 0)
    loss.backward()
    assert bright.sh.grad is not None and bright.sh.grad.abs().max() > 0


@pytest.mark.parametrize(("content", "said"), [
    (None, "init_from: "), ({"model": {"other": torch.zeros(1)}}, "name weights of this model")])
def test_weights_that_do_not_load_are_an_error_and_no_warning(data: Path, tmp_path: Path, content: Any,
                                                              said: str) -> None:
    path = tmp_path / "ckpt.pt"
    if content is not None:
        torch.save(content, path)
    with pytest.raises(JobError) as caught:
        build_model(msgspec.convert({**config_of(data), "init_from": str(path)}, Phase3Run))
    assert said in str(caught.value) and str(path) in str(caught.value)


def test_prompts_that_tell_no_views_apart_are_told_before_training() -> None:
    prompts = torch.eye(6).reshape(6, 1, 6)
    assert phase1._alike(SimpleNamespace(prompts=prompts), mv6(16)) == []
    prompts[2] = prompts[1]
    [note] = phase1._alike(SimpleNamespace(prompts=prompts), mv6(16))
    assert "front_right and right have cosine 1.000" in note
