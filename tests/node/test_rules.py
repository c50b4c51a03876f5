"""The rules over metrics: each sickness is found with its numbers, and no healthy run has any."""
from __future__ import annotations

import json
import math
import random
import re
from pathlib import Path
from unittest.mock import Mock

import pytest

from cluster.contract import AttemptDir, RunDir, read_json_lines
from cluster.node import curves, doctor, guarding, rules, series, thresholds
from cluster.node.findings import Attempt, Case, Finding, Line, leaves
from cluster.node.goodput import PARTS, goodput
from cluster.spec import JobSpec

CONFIG = {"training.optimizer.lr": "0.001", "training.schedule.warmup": "20", "training.max_steps": "400",
          "training.batch_per_rank": "2"}


def run(steps: int = 400, every: int = 100, **change: object) -> list[Line]:
    """The metrics of a healthy training, as jobs/trainer.py writes them; `change`: key -> value of a step, or a function
    of it; keys with val/ are those of evaluations."""
    draw = random.Random(0)
    lines: list[Line] = [{"t": 100.0, "step": 0, "event": "eval", "applied": 0, "val/psnr": 8.0, "val/psnr_white": 13.0}]
    for step in range(1, steps + 1):
        lr = 1e-3 * min(step / 20, 0.5 + 0.5 * math.cos(math.pi * step / steps))
        line = {"t": 100.0 + step, "step": step, "total": steps, "loss": draw.uniform(0.9, 1.1) / (1 + step / 50), "lr": lr,
                "applied": step, "grad_norm": draw.uniform(0.1, 1), "it_s": 1.0}
        lines.append(line | _at(change, step, False))
        if step % every == 0:
            found = {"t": 100.0 + step, "step": step, "total": steps, "event": "eval", "applied": step,
                     "val/psnr": 8 + 12 * (1 - math.exp(-step / 60)), "val/psnr_white": 13.0, "val/psnr_mean": 18.0,
                     "val/psnr_copy": 16.5, "val/psnr_other": 8 + 9 * (1 - math.exp(-step / 60)), "val/diversity": 0.9}
            lines.append(found | _at(change, step, True))
    return lines


def _at(change: dict, step: int, evaluation: bool) -> Line:
    return {key: value(step) if callable(value) else value for key, value in change.items()
            if key.startswith("val/") is evaluation}


def judged(lines: list[Line], **facts: object) -> list[Finding]:
    return rules.judge(Case("phase3-aaaaaa", lines, **{"config": CONFIG, **facts}))


def one(lines: list[Line], **facts: object) -> Finding:
    [found] = judged(lines, **facts)
    assert found.rule in rules.NAMES and found.why and found.cause and found.fix.startswith("launch ")
    return found


def skipping(share: float, steps: int = 400) -> list[Line]:
    """So many of the updates are skipped."""
    lines, applied = [], 0
    for line in run(steps):
        skipped = line["step"] * round(1000 * share) % 1000 < 1000 * share
        applied += "event" not in line and not skipped
        lines.append(line | {"applied": applied})
        if "event" not in line and skipped:
            lines.append({"t": line["t"], "step": line["step"], "event": "skipped", "reason": "exploded",
                          "samples_named": "sample_3, sample_9"})
    return lines


@pytest.mark.parametrize("steps", [5, 20, 60, 400])
def test_a_healthy_run_has_no_findings_however_short(steps: int) -> None:
    for end in {steps, steps // 2, 1}:
        lines = [line for line in run(steps, max(1, steps // 4)) if line["step"] <= end]
        assert judged(lines, state="RUNNING", now=100.0 + end, written=100.0 + end) == []
    assert judged(run(steps, max(1, steps // 4))) == []
    assert rules.health(Case("a", run(steps))) == "ok"


def test_a_recorded_validation_that_falls_a_little_is_healthy() -> None:
    """The demo on 24 mice, as it was measured."""
    measured = {100: 21.80, 200: 21.67, 300: 21.32, 400: 21.43}
    assert judged(run(**{"val/psnr": measured.get})) == []


def watched(step: int = 31, **said: object) -> Line:
    """What our trainer writes once of the weights of 10 tensors."""
    return {"t": 100.0 + step, "step": step, "event": "weights", "moved": 0.9997, "still": 0, "idle": 0, "of": 10, "updates": 10,
            **said}


SICK = {
    "non-finite": (run(loss=lambda n: "nan" if n > 390 else 1 / n), "not finite in 10 of 400 logged steps, to the last one"),
    "updates-skipped": (skipping(0.75), "25 % of updates applied"),
    "at-chance": (run(loss=lambda n: math.log(16) - 0.005 + 0.01 * (n % 2)), "at chance: ln 16 = 2.773; it is 2.773"),
    "loss-constant": (run(loss=0.5), "the loss is 0.5 to the last bit in the last 20"),
    "no-gradient": (run(grad_norm=0.0), "exactly 0 in the last 5"),
    "lr-stuck": (run(lr=0.0), "the learning rate is 0 in all 400"),
    "lr-end": (run(lr=lambda n: 1e-3 * min(1.0, n / 500)), "still in the warm-up of 20 updates"),
    "white-renders": (run(**{"val/psnr": 13.05}), "the pictures are white: 13.05 dB, the white picture alone has 13.00 dB"),
    "identity-copy": (run(**{"val/psnr": 16.4, "val/diversity": 0.02}), "comes back in every view: 16.40 dB, copying it has 16.50"),
    "views-collapsed": (run(**{"val/diversity": 0.05}), "they differ by 5 % of what true views do"),
    "embeddings-collapsed": (run(face_cosine=0.99, voice_cosine=0.2), "of all pairs of face embeddings is 0.990"),
    "input-ignored": (run(900, **{"val/psnr_other": lambda n: 7.9 + 12 * (1 - math.exp(-n / 60))}), "with another object's"),
    "no-better-than-baseline": (run(900, **{"val/psnr": 17.0, "val/psnr_other": 12.0}), "the mean training picture alone has 18.00 dB"),
    "overfitting": (run(**{"val/psnr": lambda n: 22 - n / 100}), "best at step 100 (21) and is 18 now"),
    "train-val-gap": (run(psnr=30.0), "psnr is 30 in training and"),
    "slower": (run(t=lambda n: 100 + n + 3 * max(0, n - 300)), "4 s per step since step 300, 1 s before: 4.0 times as slow"),
    "weights-still": ([*run(), watched(moved=0.204)], "20 % of the weights that had a gradient changed in 10 updates"),
    "starved": (run(data_wait=lambda n: 0.8 if n > 320 else 0.1), "80 % of the time since step 321 it waited for its data"),
}


@pytest.mark.parametrize("rule", SICK)
def test_each_sickness_is_found_with_its_numbers(rule: str) -> None:
    lines, words = SICK[rule]
    found = one(lines)
    assert (found.rule, words in found.what) == (rule, True), found
    assert found.first is not None and found.last is not None and found.first <= found.last


def test_tensors_that_stand_still_or_have_no_gradient_are_named() -> None:
    still = one([*run(), watched(moved=0.98, still=2, still_named="head.weight, head.bias")])
    assert (still.rule, still.severity, still.first) == ("weights-still", "warning", 31)
    assert still.what.endswith("; 2 of 10 tensors not at all: head.weight, head.bias") and "optimizer" in still.cause
    idle = one([*run(), watched(idle=1, idle_named="spare.weight")])
    assert (idle.rule, idle.severity) == ("no-gradient", "warning") and "10 updates: spare.weight" in idle.what
    ended = one([*run(5), {"t": 106.0, "step": 5, "event": "gradients", "frozen": 1, "named": "base.weight"}])
    assert (ended.rule, ended.severity, ended.what) == ("no-gradient", "error", "1 frozen tensors have a gradient: base.weight")


def test_what_is_said_last_of_the_weights_holds_and_no_curve_is_drawn_of_it() -> None:
    assert judged([*run(), watched(31, moved=0.1), watched(131)]) == []
    assert one([*run(), watched(31), watched(131, moved=0.1)]).rule == "weights-still"
    assert judged([*run(), watched(), {"t": 500.0, "step": 400, "event": "done"}]) == []
    assert curves.curves([*run(), watched()], 10).keys() == curves.curves(run(), 10).keys()


def test_a_wait_for_data_counts_when_it_lasts_and_names_the_key_of_the_loaders() -> None:
    starved = run(data_wait=lambda n: 0.8 if n > 320 else 0.1)
    assert judged([line for line in starved if line["step"] <= 375], state="RUNNING", now=475.0, written=475.0) == []  # 54 s
    assert judged(run(data_wait=lambda n: 0.8 if n < 390 else 0.1)) == []  # it is over
    config = CONFIG | {"training.loader_workers": "0"}
    facts = {"config": config, "state": "RUNNING", "now": 500.0, "written": 500.0}
    assert one(starved[:-2], **facts).fix == "launch restart phase3-aaaaaa --set training.loader_workers=4"
    assert "in the training process itself" in one(starved, config=config).what
    config["training.loader_workers"] = "6"
    assert one(starved[:-2], **facts).fix.endswith("loader_workers=12")
    assert one(starved, config=config).fix == "launch nodes" and "(12 next time)" in one(starved, config=config).cause


def test_gpus_that_do_nothing_while_it_trains(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    directory = RunDir(tmp_path / "run")
    attempt = directory.attempt(0)
    attempt.path.mkdir(parents=True)
    directory.spec.write_bytes(JobSpec("j", "t", "s", "command", ("true",), "local").to_json())
    attempt.metrics.write_text("".join(json.dumps(line) + "\n" for line in run()))
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nprintf 'GPU-a, 3\\nGPU-b, 9\\nGPU-not-mine, 98\\n'\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:/usr/bin:/bin")
    for _ in range(thresholds.IDLE_LOOKS):
        assert doctor.case_of(directory, [attempt], [], [[]], {"id": "j", "state": "RUNNING"}).gpu_use == looks(attempt)
        answer = guarding.judge(str(directory.path), 0, 0, [], ["GPU-a", "GPU-b"])
    assert [one["rule"] for one in answer["fired"]] == ["gpus-idle"] and "at the most, in 6 looks" in answer["fired"][0]["what"]
    assert guarding.judge(str(directory.path), 0, 0, answer["keys"], [])["fired"] == [] and len(looks(attempt)) == 6
    smi.write_text("#!/bin/sh\nprintf 'GPU-a, 3\\nGPU-b, 97\\n'\n")
    assert guarding.judge(str(directory.path), 0, 0, [], ["GPU-a", "GPU-b"])["fired"] == []
    smi.write_text("#!/bin/sh\nexit 9\n")
    assert guarding.judge(str(directory.path), 0, 0, [], ["GPU-a", "GPU-b"])["fired"] == [] and len(looks(attempt)) == 7


def looks(attempt: AttemptDir) -> list[tuple[float, int]]:
    return [(line["t"], max(line["busy"].values())) for line in read_json_lines(attempt.gpu_use)]


def test_the_driver_is_asked_every_five_minutes_and_not_before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    now, asked = [1000.0], []
    monkeypatch.setattr(guarding.time, "monotonic", lambda: now[0])
    watch = Mock(moved_at=0.0)

    def start(_function: object, *args: object) -> Mock:
        asked.append((now[0] - 1000, args[-1]))
        return Mock(done=lambda: True, result=lambda: {"took_s": 0.0, "keys": [], "fired": [], "config": None})

    guards = guarding.Guards(AttemptDir(tmp_path / "000"), RunDir(tmp_path), watch, start, will_step=False)
    while now[0] < 1650:
        watch.moved_at = now[0]
        guards.look(list, ["GPU-a"])
        now[0] += 5
    assert [at for at, gpus in asked if gpus] == [305, 605] and len(asked) > 40


def test_outputs_are_not_judged_in_the_first_updates() -> None:
    young = run(thresholds.SETTLED_UPDATES - 2, every=10, **{"val/psnr": 13.0, "val/diversity": 0.0})
    assert judged(young) == []


@pytest.mark.parametrize(("share", "health"), [(0.005, "ok"), (0.2, "warning"), (0.8, "sick")])
def test_the_word_follows_the_share_of_applied_updates(share: float, health: str) -> None:
    assert rules.health(Case("a", skipping(share)[:-20], config=CONFIG, state="RUNNING")) == health


def test_a_run_that_has_recovered_is_well_again() -> None:
    sick, well = skipping(0.8), run(700)
    applied = max(line.get("applied", 0) for line in sick)
    later = [line | {"step": line["step"] + 400, "applied": line["applied"] + applied} for line in well]
    assert judged(sick + later, state="RUNNING") == []


def test_an_isolated_step_that_is_not_finite_is_history_after_a_while() -> None:
    lines = run(loss=lambda n: "nan" if n == 30 else 1 / n)
    assert one(lines).severity == "info"
    assert one(lines[:60], state="RUNNING").severity == "warning"


def test_the_fix_is_a_command_with_the_keys_of_its_config() -> None:
    broken = SICK["non-finite"][0]
    sets = "--set training.optimizer.lr=0.0002 --set training.schedule.warmup=40"  # a tenth of the run, not 500
    assert one(broken).fix == f"launch restart phase3-aaaaaa --resume never {sets}"  # at its end nothing is left to train
    assert one(broken[:-1], state="RUNNING", now=1.0).fix == f"launch restart phase3-aaaaaa --resume never {sets}"
    early = [line for line in run(loss=lambda n: "nan" if n > 90 else 1 / n) if line["step"] < 101]
    assert one(early, state="RUNNING").fix == f"launch restart phase3-aaaaaa {sets}"  # its checkpoints are sound
    assert one(broken, config={}).fix == one(broken, by_hand=True).fix == "launch logs phase3-aaaaaa"
    assert one(SICK["no-gradient"][0], state="RUNNING").fix == "launch kill phase3-aaaaaa"


def test_a_sound_that_is_not_listened_to() -> None:
    deaf = run(**{"val/gap": 0.001, "val/gap_low": -0.002})
    assert "+0.001 higher than with the right one, by its 5 % bound -0.002" in one(deaf).what
    assert judged(run(180, every=60, **{"val/gap": 0.001, "val/gap_low": -0.002})) == []


def test_a_share_that_is_no_better_than_a_guess() -> None:
    assert "match is 0.510, chance is 0.500" in one(run(**{"val/match": 0.51, "val/match_chance": 0.5})).what
    assert judged(run(**{"val/match": 0.6, "val/match_chance": 0.5})) == []


def test_a_skipped_schedule_is_named_as_such() -> None:
    found = {one.rule: one for one in judged([line | ({"lr": 5e-4} if line["step"] > 380 else {}) for line in skipping(0.3)])}
    assert "120 updates were skipped, and the schedule counts applied ones" in found["lr-end"].what
    constant = CONFIG | {"training.schedule.decay": "constant"}
    assert [one.rule for one in judged(run(lr=lambda n: 1e-3 * min(1.0, n / 20)), config=constant)] == []


def test_a_rate_that_never_moves_under_a_warm_up() -> None:
    assert one(run(lr=1e-3)).rule == "lr-stuck"
    assert judged(run(lr=1e-3), config={}) == []  # nobody said that it should


def test_a_loss_at_chance_of_the_batch_that_the_command_names() -> None:
    wobbling = run(loss=lambda n: 4.0 - n / 100 if n < 124 else math.log(16) + 0.01 * (n % 3 - 1))
    assert judged(wobbling, config={}) == []  # it came from somewhere else: only who knows the batch can tell
    assert one(wobbling, config={}, argv=("train.py", "--batch_size", "16")).rule == "at-chance"
    noisy = random.Random(1)
    assert judged(run(loss=lambda n: noisy.uniform(0.4, 1.0)), config=CONFIG) == []  # ln 2 is its mean


def test_a_stall_is_three_median_steps_and_20_s_but_no_evaluation() -> None:
    lines = [line for line in run(400) if line["step"] <= 200]
    for gap, expected in ((3 + 18, []), (3 + 21, ["stalled"])):
        found = judged(lines, state="RUNNING", now=300.0 + gap, written=300.0)
        assert [one.rule for one in found] == expected
    slow = [line | {"t": line["t"] + 40 * (line["step"] > 100 or line.get("event") == "eval" and line["step"] == 100)}
            for line in lines if (line["step"], line.get("event")) != (200, "eval")]
    assert judged(slow, state="RUNNING", now=340.0 + 60, written=340.0) == []  # step 200: it evaluates again
    lone = one(slow[:-1], state="RUNNING", now=339.0 + 60, written=339.0)  # step 199
    assert lone.rule == "stalled" and "GPU" not in lone.why and "rank" not in lone.cause
    many = one(slow[:-1], state="RUNNING", now=339.0 + 60, written=339.0, world=4, gpus=4)
    assert "holds its GPUs" in many.why and "a rank that hangs" in many.cause
    hole = [*lines[:20], *lines[150:]]
    assert one(hole, state="RUNNING", now=340.0, written=300.0).rule == "stalled"
    started = [{"t": 100.0, "step": 0, "event": "resumed"}]
    assert judged(started, state="RUNNING", now=1800.0, written=100.0) == []
    assert one(started, state="RUNNING", now=1901.0, written=100.0).rule == "stalled"
    assert judged(lines, state="STOPPING", now=9999.0, written=300.0) == []
    assert judged(run(400), state="RUNNING", now=9999.0, written=500.0) == []  # it writes its artifacts


def test_a_log_without_times_stalls_by_its_mean_pace() -> None:
    lines = [{"step": n, "loss": 1 / n} for n in range(1, 11)]
    facts = {"state": "RUNNING", "from_log": True, "written": 200.0, "attempts": [Attempt(0, 95.0, 100.0, lines=lines)]}
    assert judged(lines, now=240.0, **facts) == []
    assert one(lines, now=281.0, **facts).rule == "stalled"


def test_an_ending_that_looks_like_a_success() -> None:
    nothing = Attempt(1, 1.0, 2.0, 3.0, resume_step=400, lines=[{"step": 400, "event": "resumed"}])
    assert "began at step 400 and trained no step" in one(run(), attempts=[nothing]).what
    finished = Attempt(1, 1.0, 2.0, 3.0, resume_step=400, lines=[*nothing.lines, {"step": 400, "event": "done"}])
    assert judged(run(), attempts=[finished]) == []  # only its last evaluation was missing
    assert one(run(10, applied=0), attempts=[finished]).rule == "nothing-trained"
    full = one(run(), state="OUT_OF_MEMORY", reason="out of GPU memory")
    assert "out of GPU memory at step 400" in full.what and full.fix.endswith("--set training.batch_per_rank=1")
    assert rules.health(Case("a", run(), state="FAILED")) == "unknown"  # its state says it; its learning is no news
    assert rules.health(Case("a", SICK["at-chance"][0], config=CONFIG, state="FAILED")) == "sick"


def test_half_of_its_steps_with_exit_code_0_is_told() -> None:
    half = [line for line in run(300) if line["step"] <= 50]
    assert (one(half).rule, one(half).what) == ("ended-early", "it ended at step 50 of 300, with exit code 0")
    assert judged([*half, {"t": 200.0, "step": 50, "event": "done"}]) == []  # its patience was over
    assert judged(half, state="CANCELLED") == []
    assert judged([{"step": n, "total": 300, "loss": 1 / (n + 1)} for n in range(0, 251, 50)], from_log=True) == []


def test_a_rate_that_threw_the_weights_away() -> None:
    """A short run at a rate of 1: it is begun anew with one that is sane, and a warm-up that it has steps for."""
    config = CONFIG | {"training.optimizer.lr": "1.0", "training.max_steps": "120", "training.schedule.warmup": "2"}
    thrown = run(120, grad_norm=lambda n: (31.0 if n == 7 else 0.5) if n < 10 else 0.0)
    found = one(thrown, config=config)
    assert found.what == "the gradient norm is exactly 0 since step 10; before it was up to 31 (step 7)" and found.first == 10
    assert "a learning rate that is too high (1)" in found.cause and found.fix == (
        "launch restart phase3-aaaaaa --resume never --set training.optimizer.lr=0.001 --set training.schedule.warmup=12")
    config["training.schedule.warmup"] = "500"  # longer than the run
    assert one(thrown, config=config).fix.endswith("warmup=12")
    assert "--set training.optimizer.lr" in one(thrown[:60], config=config, state="RUNNING", now=1.0).fix


def test_the_config_of_the_attempt_that_made_the_steps_is_the_one_to_change(tmp_path: Path) -> None:
    directory = RunDir(tmp_path / "run")
    for number, lr in enumerate(("1.0", "0.2")):
        directory.attempt(number).path.mkdir(parents=True)
        directory.attempt(number).config.write_text(f"training:\n  lr: {lr}\n  batch_size: 8\n")
    directory.spec.write_bytes(JobSpec("j", "t", "s", "python", ("a.py",), "local").to_json())
    attempts, own = directory.attempts(), [run(20), [{"t": 1.0, "step": 20, "event": "resumed"}]]
    case = doctor.case_of(directory, attempts, run(20), own, {"id": "j", "state": "FAILED"})
    assert (case.config["training.lr"], case.newest["training.lr"]) == ("1.0", "0.2")


# --- other people's programs, by progress rules alone --------------------------------------------------------

FACE_VOICE = {"step": r"Epoch (\d+)/", "total": r"Epoch \d+/(\d+)", "loss": r"Train Loss: ([\d.]+)",
              "val/loss": r"Val Loss: ([\d.]+)"}


def face_voice_log() -> bytes:
    """The public run: 807 and 143 pairs in batches of 16. What an epoch says is the mean over its batches, the last one
    smaller (7 and 15): between ln 16 and a little less."""
    draw = random.Random(0)
    text = []
    for epoch in range(1, 47):
        train, val = (2.7670, 2.7654) if epoch == 1 else (2.7564 + draw.uniform(0, 0.011), 2.7654 + draw.uniform(-1, 1) * 1e-3)
        text.append(f"Epoch {epoch}/300 [Train]: 100% 51/51 [01:02<00:00, 1.22s/it, loss=1.9534]\r"
                    f"Epoch {epoch}/300 [Val]: 100% 9/9 [00:06<00:00, 1.47it/s, loss=2.7081]\n"
                    f"Epoch {epoch}/300: Train Loss: {train:.4f}, Val Loss: {val:.4f}\n")
    return "".join(text).encode()


def test_the_public_face_voice_run_was_at_chance() -> None:
    lines = series.by_rules(face_voice_log(), FACE_VOICE)
    assert lines[0] == {"step": 1, "total": 300, "loss": 2.7670, "val/loss": 2.7654} and len(lines) == 46
    found = one(lines, config={}, from_log=True, state="CANCELLED")
    assert found.what.startswith("the loss stands at chance: ln 16 = 2.773") and (found.severity, found.last) == ("error", 46)


def test_the_public_mouse_run_applied_nine_percent() -> None:
    expressions = {"step": r"step (\d+)", "applied": r"param_update_step: (\d+)/", "attempted": r"param_update_step: \d+/(\d+)",
                   "skipped": r"grad norm too large ([\d.]+)", "loss": r"loss: ([\d.]+)"}
    log = "".join(
        (f"WARNING: step {n} grad norm too large {58.02 if n == 766 else 30 + n % 30:.2f} > 20.0, skipping optimizer step\n"
         if n % 11 else "") + f"param_update_step: {n // 11}/{n} loss: {1 / n:.4f}\n" for n in range(1, 767))
    found = one(series.by_rules(log.encode(), expressions), config={}, from_log=True, state="RUNNING")
    assert found.what.startswith("9 % of updates applied: 69 of 766") and "gradient norms of skipped ones around" in found.what


def test_rules_without_a_match_find_nothing() -> None:
    assert series.by_rules(b"hello\n\xff\n", FACE_VOICE) == []
    assert series.by_rules(b"lr 3\nEpoch 1/2: Train Loss: nan\n", FACE_VOICE | {"loss": r"Train Loss: (\S+)", "lr": r"lr (\S+)"}) \
        == [{"step": 1, "total": 2, "loss": "nan"}]


def test_a_loss_that_its_rule_no_longer_finds_or_cuts_is_told() -> None:
    """The pattern of a person who has never seen a loss that is nan, or small."""
    expressions = {"step": r"step (\d+)/", "total": r"/(\d+)", "loss": r"loss ([\d.]+)"}
    sick = b"".join(b"step %d/120 loss %s\n" % (n, b"nan" if n >= 40 else b"%.4f" % (1 / n)) for n in range(1, 121))
    found = one(series.by_rules(sick, expressions), config={}, from_log=True)
    assert found.rule == "unread" and "no loss was found in its output since step 40" in found.what and found.last == 120
    small = b"".join(b"step %d/20 loss %.3e, lr 1,200.5\n" % (n, 10.0 ** -n) for n in range(1, 21))
    found = one(series.by_rules(small, expressions), config={}, from_log=True)
    assert "`loss` read 1.000 where its output says 1.000e-01" in found.what and found.first == 1
    seldom = b"".join(b"step %d/100\n" % n + (b"loss 0.5\n" if n % 10 == 1 else b"") for n in range(1, 101))
    assert judged(series.by_rules(seldom, expressions), config={}, from_log=True) == []
    whole = {"step": r"step 0*(\d+)/", "loss": r"loss ([^\s,]+)", "lr": r"lr (\S+)"}
    padded = b"".join(b"step %04d/20 loss %.3e, lr 1,200.5\n" % (n, 10.0 ** -n) for n in range(1, 21))
    assert judged(series.by_rules(padded, whole), config={}, from_log=True) == []


# --- what belongs to all of them -----------------------------------------------------------------------------

def test_the_keys_of_a_config_without_a_yaml_parser() -> None:
    text = "# a note\ntraining:\n  optimizer:\n    lr: 1.0e-03\n  list:\n  - 1\n  name: 'a b'\nseed: 0\n"
    assert leaves(text) == {"training.optimizer.lr": "1.0e-03", "training.name": "a b", "seed": "0"}


def test_every_rule_has_its_section_in_the_document_and_every_threshold_is_used() -> None:
    root = Path(rules.__file__).parents[2]
    sections = re.findall(r"^## (\S+)$", (root / "docs/doctor.md").read_text(), re.M)
    assert sorted(sections) == sorted(rules.NAMES)
    assert {found.rule for lines, _ in SICK.values() for found in judged(lines)} <= set(rules.NAMES)
    named = [name for name in vars(thresholds) if name.isupper()]
    code = "".join((root / f"cluster/node/{name}.py").read_text() for name in ("learning", "outputs", "pacing", "goodput", "findings",
                                                                                "unread"))
    assert [name for name in named if f"limit.{name}" not in code] == []


def test_the_time_of_a_job_adds_up() -> None:
    own = [{"t": 99.0, "step": 0, "event": "resumed"}, *run(100)[1:]]
    own = [line | {"t": line["t"] + 11} for line in own]
    first = Attempt(0, 100.0, 101.0, 230.0, lines=own)
    second = Attempt(1, 250.0, 251.0, 300.0, resume_step=80, lines=[{"t": 260.0, "step": 80, "event": "resumed"}, *(
        {"t": 180.0 + n, "step": n, "loss": 1.0, "grad_norm": 1.0, "it_s": 1.0} for n in range(81, 101))])
    found = goodput([first, second], 90.0, 300.0)
    assert found["wall"] == pytest.approx(300 - 90) and found["wall"] == pytest.approx(sum(found[part] for part in PARTS))
    assert (found["queue"], found["between"], found["replay"]) == (10.0, 20.0, 20.0)
    assert found["useful"] == pytest.approx(100, abs=3) and found["finish"] == pytest.approx(19 + 20)
    assert goodput([], 0.0, 1.0) == {}


@pytest.mark.parametrize("budget", [None, 64 << 10])
def test_thirty_thousand_steps_are_read_whole_or_by_their_ends(tmp_path: Path, budget: int | None) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text("".join(json.dumps({"t": n, "step": n, "loss": 1.0, "pad": "x" * 100}) + "\n" for n in range(30_000)))
    lines = list(series._json_lines(path, budget))
    assert (lines[0]["step"], lines[-1]["step"]) == (0, 29_999)
    assert len(lines) == 30_000 if budget is None else 100 < len(lines) < 600
