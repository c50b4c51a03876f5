"""What is found out about a job before its processes are started: by its node at a submit, and by its supervisor."""
from __future__ import annotations

import json
import pickle
import socket
import zipfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.contract import RunDir
from cluster.events import Reason
from cluster.node import check_deep, preflight
from cluster.node.check import quick
from cluster.node.check_deep import Program
from cluster.node.gpus import Gpu
from cluster.node.measured import Measure
from cluster.spec import Cost, JobSpec, Slurm
from tests.helpers import wait_until
from tests.node.conftest import Job

RIG, OTHER = "a" * 64, "b" * 64
TRAIN, VAL = "training.dataset.path", "training.validation.path"
# The job's own jobs/preflight.py: says what the test wrote beside it, and notes that it was asked.
STUB = """
import pathlib, sys
here = pathlib.Path(__file__).parent
(here.parent / "asked").open("a").write(" ".join(sys.argv[1:]) + "\\n")
print((here / "says").read_text())
"""


def ask(inputs: dict[str, Path], **more: Any) -> list[dict[str, Any]]:
    return quick({"again": ["phase3", "--node", "gpu05"], "node": "gpu05", "inputs": {key: str(path) for key, path in inputs.items()},
                  "skips_bad": False, "resume": "", "total": None, "ports": [], **more})


def only(found: list[dict[str, Any]]) -> dict[str, Any]:
    [one] = found
    assert one["fix"] and one["why"] and one["where"]
    return one


def samples(at: Path, count: int, rig: str = "", views: int = 6) -> Path:
    """A data set -> its list."""
    for number in range(count):
        (at / f"s{number}").mkdir(parents=True)
        record = {"rig": {"fingerprint": rig}} if rig else {}
        (at / f"s{number}" / "opencv_cameras.json").write_text(json.dumps({"frames": [{}] * views, **record}))
    (at / "data_train.txt").write_text("".join(f"s{number}\n" for number in range(count)))
    return at / "data_train.txt"


def weights(path: Path, size: int = 16) -> Path:
    header = json.dumps({"w": {"dtype": "F32", "shape": [size // 4], "data_offsets": [0, size]}}).encode()
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(len(header).to_bytes(8, "little") + header + bytes(size))
    return path


def checkpoint(at: Path, step: int, rig: str = RIG) -> Path:
    weights(at / "model.safetensors")
    (at / "state.json").write_text(json.dumps({"progress": {"step": step}, "identity": {"rig": rig}}))
    files = {path.name: {"size": path.stat().st_size, "sha256": "0"} for path in at.iterdir()}
    (at / "manifest.json").write_text(json.dumps({"version": 1, "job": "j", "attempt": 0, "step": step,
                                                  "resumed_from": None, "files": files}))
    return at


# --- the quick tier -----------------------------------------------------------------------------------------

def test_sound_inputs(tmp_path: Path) -> None:
    train = samples(tmp_path / "train", 40, RIG)
    assert ask({TRAIN: train, VAL: train.parent, "init_from": checkpoint(tmp_path / "step-00000500-a000", 500)},
               total=100) == []


def test_a_path_that_is_not_there_and_a_list_of_nothing(tmp_path: Path) -> None:
    (tmp_path / "empty.txt").write_text("\n")
    gone, empty = ask({"init_from": tmp_path / "gone", TRAIN: tmp_path / "empty.txt"})
    assert (gone["check"], gone["severity"], gone["where"]) == ("inputs", "error", "init_from")
    assert gone["fix"] == "launch check phase3 --node gpu05 --set init_from=/path/on/gpu05"
    words = ["phase3", "--config", "my demo", "--set", "init_from=/no", "--resume", "healthy"]
    again = only(ask({"init_from": tmp_path / "gone"}, again=words))["fix"]  # all that was given, and in its place
    assert again == "launch check phase3 --config 'my demo' --resume healthy --set init_from=/path/on/gpu05"
    assert empty["check"] == "lists" and "names no sample" in empty["what"]


@pytest.mark.parametrize(("skips", "gone", "severity"), [(False, 1, "error"), (True, 1, "warning"), (True, 3, "error")])
def test_samples_that_are_gone(tmp_path: Path, skips: bool, gone: int, severity: str) -> None:
    train = samples(tmp_path / "train", 3)
    for number in range(gone):
        (tmp_path / f"train/s{2 - number}/opencv_cameras.json").unlink()
    one = only(ask({TRAIN: train}, skips_bad=skips))
    assert (one["check"], one["severity"]) == ("lists", severity) and f"{gone} of 3" in one["what"]


def test_weights_that_are_cut_off(tmp_path: Path) -> None:
    path = weights(tmp_path / "unet" / "model.safetensors", 4096)
    path.write_bytes(path.read_bytes()[:-1])
    assert "is cut off" in only(ask({"pretrained": tmp_path}))["what"]
    path.write_text("not weights at all")
    assert "is no safetensors file" in only(ask({"pretrained": tmp_path}))["what"]
    half = checkpoint(tmp_path / "step-00000001-a000", 1)
    (half / "state.json").write_text("{}")
    assert "its manifest says" in only(ask({"init_from": half}))["what"]
    (half / "manifest.json").unlink()
    assert "never finished" in only(ask({"init_from": half}))["what"]


def test_rigs_that_do_not_belong_together(tmp_path: Path) -> None:
    train, val = samples(tmp_path / "train", 2, RIG), samples(tmp_path / "val", 2, OTHER)
    one = only(ask({TRAIN: train, VAL: val}))
    assert (one["check"], one["severity"]) == ("rig", "error") and RIG[:12] in one["what"] and OTHER[:12] in one["what"]
    older = checkpoint(tmp_path / "step-00000001-a000", 1, OTHER)
    assert only(ask({TRAIN: train, "init_from": older}))["severity"] == "warning"
    assert only(ask({TRAIN: train}, resume=str(older)))["severity"] == "error"
    (older / "mvdiffusion.json").write_text(json.dumps({"rig": RIG, "num_views": 4}))
    assert "makes 4 views, the samples have 6" in only(ask({TRAIN: train}, resume=str(older)))["what"]


def torch_file(path: Path, views: int, width: int) -> Path:
    """As torch.save writes a tensor, without torch: a zip whose data.pkl builds it."""

    class Made:
        def __reduce__(self) -> tuple[Any, ...]:
            return _rebuild_tensor_v2, (None, 0, (views, 77, width), (77 * width, width, 1), False, {})

    path.parent.mkdir(parents=True, exist_ok=True)
    with zipfile.ZipFile(path, "w") as file:
        file.writestr(f"{path.stem}/data.pkl", pickle.dumps(Made(), protocol=2))
    return path


def _rebuild_tensor_v2(*_args: Any) -> None:
    raise AssertionError("a file of a person must not have anything called")


def test_prompts_of_another_text_encoder(tmp_path: Path) -> None:
    (tmp_path / "unet").mkdir()
    (tmp_path / "unet/config.json").write_text(json.dumps({"cross_attention_dim": 1024}))
    given = {"pretrained": tmp_path, "prompt_embeds": torch_file(tmp_path / "prompts.pt", 6, 768)}
    one = only(ask(given))
    assert (one["check"], one["severity"], one["where"]) == ("rig", "error", "prompt_embeds")
    assert "6 views and 768 wide (CLIP ViT-L/14" in one["what"] and "takes 6 views and 1024" in one["what"]
    torch_file(tmp_path / "prompts.pt", 4, 1024)
    assert "of 4 views and 1024 wide, the UNet" in only(ask(given))["what"]
    torch_file(tmp_path / "prompts.pt", 6, 1024)
    torch_file(tmp_path / "prompt_embeds.pt", 6, 1024)
    assert ask(given) == [] == ask({"generator.checkpoint": tmp_path})
    (tmp_path / "prompts.pt").write_bytes(b"no zip file")
    assert ask(given) == []  # the deep tier says more of it


def test_a_checkpoint_that_is_past_the_end(tmp_path: Path) -> None:
    one = only(ask({}, resume=str(checkpoint(tmp_path / "step-00000500-a000", 500)), total=500))
    assert one["check"] == "resume" and "--set training.max_steps=1000" in one["fix"]


def test_what_an_attempt_ends_with_has_the_fix_in_its_first_line() -> None:
    one = {"severity": "error", "where": "resume", "what": "n is 5 here and 4 there\n  model: 12 not there", "fix": "--set n=4"}
    ended, _ = preflight.said([one, one | {"what": "n is 5: --set n=4"}])
    assert ended.splitlines() == ["resume: n is 5 here and 4 there; --set n=4", "  model: 12 not there",
                                  "  resume: n is 5: --set n=4"]


def test_a_port_that_somebody_has() -> None:
    with socket.socket() as taken:
        taken.bind(("", 0))
        taken.listen()
        port = taken.getsockname()[1]
        assert f"port {port} is in use" in only(ask({}, ports=[port]))["what"]
    assert ask({}, ports=[port]) == []


# --- before an attempt --------------------------------------------------------------------------------------

def found(severity: str, what: str) -> str:
    return json.dumps({"found": [{"check": "samples", "severity": severity, "what": what, "where": "data",
                                  "why": "it matters", "fix": "mend it"}], "imports": {}, "least_gpu_mb": 0})


@pytest.fixture
def looked_at(make_job: Callable[..., Job]) -> Callable[..., Job]:
    """looked_at(says) -> a job whose own jobs/preflight.py says that, and which prints `began`."""
    def make(says: str, **fields: Any) -> Job:
        job = make_job("command", "echo", "began", preflight="phase3", **fields)
        (job.run.code / "jobs").mkdir(parents=True)
        (job.run.code / "jobs/preflight.py").write_text(STUB)
        (job.run.code / "jobs/says").write_text(says)
        job.run.config.write_text("training:\n  max_steps: 5\n")
        return job

    return make


def asked(job: Job) -> int:
    path = job.run.code / "asked"
    return len(path.read_text().splitlines()) if path.exists() else 0


def test_an_error_ends_the_job_before_its_program_starts(looked_at: Callable[..., Job]) -> None:
    job = looked_at(found("error", "s3 has no picture"))
    job.start().ended()
    [end] = job.endings
    assert (job.state, end.reason) == ("FAILED", Reason.PREFLIGHT)
    assert end.detail == "data: s3 has no picture; mend it" and "began" not in job.log()


def test_a_warning_is_a_note_and_a_restart_does_not_look_again(looked_at: Callable[..., Job]) -> None:
    job = looked_at(found("warning", "2 samples are left out"))
    job.start().ended()
    assert job.state == "COMPLETED" and "began" in job.log()
    assert any("2 samples are left out" in getattr(event, "text", "") for event in job.events)
    job.start(by="restart").ended()
    assert (asked(job), len(job.endings)) == (1, 2)
    job.run.config.write_text("training:\n  max_steps: 6\n")
    job.start(by="restart").ended()
    assert asked(job) == 2


def test_a_kill_does_not_wait_for_it(looked_at: Callable[..., Job]) -> None:
    job = looked_at("")
    (job.run.code / "jobs/preflight.py").write_text(STUB + "import time; print('up', flush=True); time.sleep(600)\n")
    job.start()
    wait_until(lambda: asked(job), what="the preflight")
    job.stop(now=True)
    assert job.state == "CANCELLED" and "began" not in job.log()


def test_a_code_that_cannot_be_asked_starts_all_the_same(looked_at: Callable[..., Job]) -> None:
    crashed, older = looked_at("no JSON"), looked_at("")
    (older.run.code / "jobs/preflight.py").unlink()
    crashed.start(), older.start()
    assert [job.ended() and job.state for job in (crashed, older)] == ["COMPLETED", "COMPLETED"]


def test_an_environment_that_lacks_a_package(tmp_path: Path) -> None:
    import sys

    (tmp_path / "jobs").mkdir()
    (tmp_path / "jobs/preflight.py").write_text("import no_such_package\n")
    program = Program(sys.executable, str(tmp_path), {}, tmp_path / "config.yaml", "phase3")
    said = check_deep._ask(program, JobSpec("j", "t", "phase3", "python", ("x",), "gpu05"), 0, False, "", 30)
    assert (said["found"][0]["check"], said["found"][0]["severity"]) == ("environment", "error")
    assert "no_such_package" in said["found"][0]["what"]


def test_memory_that_a_gpu_does_not_have(tmp_path: Path) -> None:
    card = Gpu(0, "GPU-0", "NVIDIA A30", 24_000, 0, "550")
    spec = JobSpec("j", "t", "phase3", "python", ("x",), "gpu05", gpus=1, cost=Cost("alike"))
    counted = "1.9 G trained weights"
    [error] = check_deep._memory(spec, tmp_path, [card], 30_000, counted)
    assert error.severity == "error" and f"29.3 GB ({counted})" in error.what and "NVIDIA A30" in error.what
    said = {mb: [(one.severity, one.check) for one in check_deep._memory(spec, tmp_path, [card], mb, counted)]
            for mb in (0, 4_000, 23_500)}
    assert said == {0: [], 4_000: [("info", "memory")], 23_500: [("warning", "memory")]}  # nothing was measured
    assert list(check_deep._memory(spec, tmp_path, [], 4_000, counted)) == []
    [cluster] = check_deep._memory(replace(spec, slurm=Slurm(None, None, {})), tmp_path, [], 4_000, counted)
    assert cluster.severity == "info" and "the cluster decides" in cluster.why
    line = Measure("alike", "phase3-abc", 0.0, "gpu05", "NVIDIA H100", True, 9, 1.0, 1.0, 0.0, 0.0, None, 0, 0, 0, 60_000)
    (tmp_path / ".launch").mkdir()
    (tmp_path / ".launch/measured.jsonl").write_text(json.dumps(vars(line)) + "\n")
    [warning] = check_deep._memory(spec, tmp_path, [card], 4_000, counted)
    assert warning.severity == "warning" and "phase3-abc took 58.6 GB on NVIDIA H100" in warning.what


def test_a_disk_that_its_checkpoints_would_fill(tmp_path: Path) -> None:
    (tmp_path / ".launch").mkdir()
    spec = JobSpec("j", "t", "phase3", "python", ("x",), "gpu05", cost=Cost("alike", checkpoints=4))
    [error] = check_deep._disk(spec, tmp_path, 1e15)
    assert (error.check, error.severity) == ("disk", "error") and "4 checkpoints will take 4e+06 GB" in error.what
    assert list(check_deep._disk(spec, tmp_path, 1e3)) == []
    line = Measure("alike", "phase3-abc", 0.0, "gpu05", "CPU", True, 9, 1.0, 1.0, 0.0, 0.0, None, 0, 0, 0)
    (tmp_path / ".launch/measured.jsonl").write_text(json.dumps(vars(line)) + "\n")
    assert list(check_deep._disk(spec, tmp_path, 1e15)) == []  # it is told by its measured size


def test_what_was_found_good_is_forgotten_when_an_input_changes(tmp_path: Path) -> None:
    run, data = RunDir(tmp_path / "run"), tmp_path / "data_train.txt"
    run.attempt(0).path.mkdir(parents=True)
    data.write_text("a\n")
    run.attempt(0).config.write_text(f"training:\n  path: {data}\n")
    program = Program("/usr/bin/python3", "/", {}, run.attempt(0).config, "phase3")
    before = check_deep._key(run, program, ())
    assert check_deep._key(run, program, ()) == before
    data.write_text("a\nb\n")
    assert check_deep._key(run, program, ()) != before != check_deep._key(run, program, ("GPU-1",))


