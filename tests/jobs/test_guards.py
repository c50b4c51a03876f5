"""What the trainer sees of its own weights, gradients and data: the right word for each sickness, and no other bits."""
from __future__ import annotations

import itertools
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from cluster.contract import RunDir, merged_metrics, read_json_lines
from cluster.node import rules
from cluster.node.findings import Case, Finding
from jobs import guards, loader
from jobs.guards import MOVES_WITHIN, WeightWatch
from jobs.loader import Waits
from jobs.metrics import Metrics, Pace
from jobs.runtime import Job, StopFlag
from jobs.stage import Learning
from jobs.trainer import Trainer
from jobs.world import World
from tests.jobs.conftest import job_in
from tests.jobs.small_stage import SmallStage, small_plan


def watched(trained: dict[str, nn.Parameter], stepped: list[nn.Parameter], lr: float, used: int = 10**9) -> dict[str, Any]:
    """AdamW steps `stepped` by random gradients in the first `used` rows of each -> what was told."""
    told: list[dict[str, Any]] = []
    watch = WeightWatch(trained, lr, lambda **said: told.append(said))
    optimizer = torch.optim.AdamW(stepped, lr=lr, weight_decay=0.0)
    draw = torch.Generator().manual_seed(0)
    for update in range(3 + 2 * MOVES_WITHIN):
        for parameter in trained.values():
            parameter.grad = torch.zeros_like(parameter)
            parameter.grad[:used] = torch.randn(parameter[:used].shape, generator=draw)
        optimizer.step()
        watch.see(lr * min(1.0, update / 4))  # at half of the peak from update 2 on
        assert len(told) == (update >= 2 + MOVES_WITHIN)
    return told[0]


def weights(rows: int, columns: int, dtype: torch.dtype = torch.float32) -> nn.Parameter:
    return nn.Parameter((0.02 * torch.randn(rows, columns, generator=torch.Generator().manual_seed(1))).to(dtype))


@pytest.mark.parametrize(("dtype", "lr", "low", "high"), [
    (torch.bfloat16, 1e-5, 0.05, 0.35), (torch.bfloat16, 1e-3, 0.9, 1.0), (torch.float32, 1e-5, 0.999, 1.0)])
def test_bf16_weights_under_a_small_rate_hardly_move(dtype: torch.dtype, lr: float, low: float, high: float) -> None:
    trained = {"layer": weights(128, 64, dtype)}
    said = watched(trained, list(trained.values()), lr)
    assert low <= said["moved"] <= high and (said["still"], said["idle"], said["of"]) == (0, 0, 1)
    found = rules.judge(Case("a", [{"step": 9, "event": "weights", **said}]))
    assert [(one.rule, one.severity) for one in found] == ([("weights-still", "error")] if high < 0.5 else [])


def test_a_tensor_that_nobody_steps_is_named_and_one_without_a_gradient_too() -> None:
    trained = {"a": weights(9, 9), "forgotten": weights(9, 9), "b": weights(3000, 7)}
    said = watched(trained, [trained["a"], trained["b"]], 1e-3)
    assert (said["still"], said["still_named"], said["idle"]) == (1, "forgotten", 0)
    trained = {"a": weights(9, 9), "spare": nn.Parameter(torch.zeros(0, 4))}  # nothing in it that could move
    assert watched(trained, list(trained.values()), 1e-3, used=0) == {
        "still": 0, "idle": 1, "of": 1, "updates": MOVES_WITHIN, "idle_named": "a"}


def test_rows_of_an_embedding_that_were_not_met_may_stay() -> None:
    trained = {"words": weights(4000, 16)}
    said = watched(trained, list(trained.values()), 1e-3, used=40)
    assert (said["moved"], said["still"], said["idle"]) == (1.0, 0, 0)


@pytest.mark.parametrize("shape", [(4096, 4096), (2048, 3), (1, 1), (7, 2048), (30522, 768)])
def test_a_sample_is_small_and_meets_all_columns_alike(shape: tuple[int, int]) -> None:
    places = range(0, shape[0] * shape[1], guards._stride(shape[0] * shape[1]))
    columns = {place % shape[1] for place in places}
    assert len(places) <= 2048 and len(columns) >= min(shape[1], len(places)) * 0.9


# --- in the trainer -----------------------------------------------------------------------------------------

class Frozen(SmallStage):
    """Its first layer has the rate 0."""

    def learning(self, name: str, parameter: nn.Parameter) -> Learning:
        return Learning(lr=0.0, weight_decay=0.0) if name.startswith("net.0.") else super().learning(name, parameter)


def train(job: Job, stage: SmallStage, **plan: Any) -> list[dict[str, Any]]:
    chosen = small_plan(**{"total": 20, "accumulation": 1, **plan})
    metrics = Metrics(chosen.total)
    metrics.open(job.attempt.metrics)
    Trainer(stage, chosen, World(0, 1, torch.device("cpu")), job, metrics, StopFlag()).run()
    return list(read_json_lines(job.attempt.metrics))


def verdicts(lines: list[dict[str, Any]]) -> list[dict[str, Any]]:
    return [line for line in lines if line.get("event") == "weights"]


def judged(run: Path) -> list[Finding]:
    return rules.judge(Case("small-1", merged_metrics(RunDir(run))))


def test_a_healthy_training_says_once_that_its_weights_move(job: Job) -> None:
    [said] = verdicts(train(job, SmallStage()))
    assert said["moved"] > 0.99 and (said["still"], said["idle"], said["of"]) == (0, 0, 8)
    assert said["step"] == 3 + MOVES_WITHIN  # the rate of the third update is half of the highest
    assert judged(job.run.path) == []


def test_a_layer_that_stands_still_is_named(job: Job) -> None:
    train(job, Frozen())
    [found] = judged(job.run.path)
    assert (found.rule, found.severity) == ("weights-still", "warning")
    assert "2 of 8 tensors not at all: net.0.weight, net.0.bias" in found.what


def test_a_resumed_run_is_looked_at_anew_and_what_it_says_holds(tmp_path: Path) -> None:
    first = job_in(tmp_path / "run")
    train(first, Frozen())
    again = job_in(first.run.path, 1, first.checkpoints / "step-00000020-a000")
    assert len(verdicts(train(again, SmallStage(), total=60))) == 1
    assert judged(first.run.path) == []


def test_a_look_changes_no_bit(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen, blind = job_in(tmp_path / "a"), job_in(tmp_path / "b")
    train(seen, SmallStage())
    monkeypatch.setattr(WeightWatch, "see", lambda *_: None)
    assert verdicts(train(blind, SmallStage())) == []
    for name in ("model", "optimizer"):
        one, other = (job.checkpoints / "step-00000020-a000" / f"{name}.safetensors" for job in (seen, blind))
        assert one.read_bytes() == other.read_bytes()


# --- waiting for data ---------------------------------------------------------------------------------------

class Clock:
    """Seconds pass when a batch is fetched, and by `tick`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.now = 0.0
        monkeypatch.setattr(loader.time, "monotonic", lambda: self.now)

    def fetching(self, seconds: float) -> Any:
        for number in itertools.count():
            self.now += seconds
            yield number


def test_the_wait_for_data_is_a_share_of_the_time(monkeypatch: pytest.MonkeyPatch) -> None:
    clock, waits, pace = Clock(monkeypatch), Waits(torch.device("cpu"), 2), Pace(100)
    source = clock.fetching(3.0)
    for _ in range(4):
        began = clock.now
        for _ in range(2):
            waits.next(source)
            clock.now += 1.0  # the pass
            waits.passed()
        pace.add(2, clock.now - began, waits.taken())
    assert pace.values(50) == {"it_s": 0.25, "eta_s": 200.0, "data_wait": 0.75}
    unmeasured = Pace(100)
    unmeasured.add(1, 1.0)
    assert unmeasured.values(50) == {"it_s": 1.0, "eta_s": 50.0}


def test_a_gpu_that_works_while_the_next_batch_is_fetched_does_not_wait(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each pass keeps the GPU busy for 2 s; its clock goes on where its work of before has ended."""
    clock, waits = Clock(monkeypatch), Waits(torch.device("cuda"), 3)
    free_at = 0.0

    class Mark:
        def __init__(self) -> None:
            self.at = max(free_at, clock.now)

        def elapsed_time(self, later: Mark) -> float:
            return 1000 * (later.at - self.at)

    monkeypatch.setattr(loader, "_mark", Mark)
    for seconds, idle in ((1.5, 1.5), (5.0, 5.0 + 3.0 + 3.0)):
        source = clock.fetching(seconds)
        for _ in range(3):
            waits.next(source)
            free_at = max(free_at, clock.now) + 2.0
            waits.passed()
        clock.now = free_at  # it waits for the device before the update
        assert waits.taken() == pytest.approx(idle)


def test_a_training_logs_it(job: Job) -> None:
    shares = [line["data_wait"] for line in train(job, SmallStage(), total=5) if "event" not in line]
    assert len(shares) == 5 and all(0 < share < 1 for share in shares)
