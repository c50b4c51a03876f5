"""Whatever breaks under a running job for a while: nothing is lost, nothing wrong is shown, and status answers."""
from __future__ import annotations

import json
import time
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path

import pytest

from tests.helpers import wait_until
from tests.testbed.slurmbed import GPU_NODES, SlurmBed

from .conftest import laptop
from .kill_points import last_step
from .lab import ENDED, Lab
from .test_slurm import at_step, steps_of

STATUS_S = 3.5
STEPS_S = 10  # at most: each takes 0.1 s at least
FAULT_S = {"link down": 30, "loss and delay": 30, "frozen node": 20, "SLURM's daemons stopped": 60, "/home full": 10,
           "scratch full": 20}
HERE = Path(__file__).resolve()
# A node's own; programs keep temporary files there. A checkout below /tmp would be hidden by another file system.
SCRATCH = ("/scratch",) if HERE.is_relative_to("/tmp") else ("/tmp", "/scratch")


@contextmanager
def broken(fault: str, bed: SlurmBed, node: str) -> Iterator[None]:
    with ExitStack() as stack:
        if fault == "link down":
            stack.enter_context(bed.link_down(node))
        elif fault == "loss and delay":
            stack.enter_context(bed.slow_link(node, delay_ms=25, loss_percent=2))
        elif fault == "frozen node":
            stack.enter_context(bed.frozen(node))
        elif fault == "scratch full":
            stack.enter_context(scratch_full(bed, node))
        elif fault == "SLURM's daemons stopped":
            stack.enter_context(bed.accounting_down())
            stack.enter_context(bed.controller_down())
        else:
            stack.enter_context(home_full(bed))
        yield


@contextmanager
def home_full(bed: SlurmBed) -> Iterator[None]:
    """Not a byte is free in the home that all nodes share."""
    filler = bed.root / "home/alice/filler"
    with open(filler, "wb", buffering=0) as file, suppress(OSError):
        while True:
            file.write(bytes(1 << 22))
    try:
        yield
    finally:
        filler.unlink()


@contextmanager
def small_scratch(bed: SlurmBed) -> Iterator[None]:
    """A file system of its own, that can be filled, is each node's scratch: all others share one."""
    with ExitStack() as stack:
        for node in GPU_NODES:
            for place in SCRATCH:
                bed.exec(node, "mount", "-t", "tmpfs", "-o", "size=16m,mode=1777", "scratch", place)
                stack.callback(bed.exec, node, "umount", "-l", place)
        yield


@contextmanager
def scratch_full(bed: SlurmBed, node: str) -> Iterator[None]:
    """Not a byte is free on the node itself."""
    fillers = " ".join(f"{place}/filler" for place in SCRATCH)
    bed.sh(node, f"for one in {fillers}; do cat /dev/zero >$one 2>/dev/null || true; done")
    try:
        yield
    finally:
        bed.sh(node, f"rm {fillers}")


def undrained(bed: SlurmBed, node: str) -> None:
    """What an administrator does with a node that SLURM took out of service."""
    if bed.node_states()[node].startswith("drain"):
        print(f"{node} was drained: {bed.slurm('sinfo', '-h', '-R').strip()}")
        bed.slurm("scontrol", "update", f"NodeName={node}", "State=RESUME", user="root")


@pytest.mark.campaign
@pytest.mark.parametrize("where", ["gpu05", "lab"])
@pytest.mark.parametrize("fault", FAULT_S)
def test_a_fault_passes(slurm_bed: SlurmBed, project: Path, tmp_path: Path, where: str, fault: str) -> None:
    lab = laptop(slurm_bed, project, tmp_path / "laptop", where)
    steps = STEPS_S * (FAULT_S[fault] + 20)
    with small_scratch(slurm_bed) if fault == "scratch full" else nullcontext():
        _passes(lab, slurm_bed, fault, steps)


def _passes(lab: Lab, bed: SlurmBed, fault: str, steps: int) -> None:
    job, node = lab.submit("tiny", "--set", f"steps={steps}"), ""
    try:
        run = at_step(lab, job, 12)
        node = json.loads(run.attempts()[-1].heartbeat.read_bytes())["hostname"]
        answers = []
        with broken(fault, bed, node):
            until = time.monotonic() + FAULT_S[fault]
            wait_until(partial(_ask, lab, job, answers, until), FAULT_S[fault] + 60, "the fault is over")
        seconds = sorted(took for took, _ in answers)
        print(f"{fault} on {lab.node}: {len(answers)} answers of status, slowest {seconds[-1]:.1f} s (wanted {STATUS_S})")
        assert seconds[-1] < 5 * STATUS_S
        if fault == "/home full":
            _may_need_a_restart(lab, job)
        lab.launch("wait", job, code=None, timeout_s=400)
        assert lab.status(job)["state"] == "COMPLETED", lab.written(job)
        assert steps_of(run) == list(range(1, steps + 1))
        assert last_step(run) == steps and lab.left_over() == []
    finally:
        if lab.status(job)["state"] not in ENDED:
            lab.launch("kill", "--now", job, code=None)
        if node:
            undrained(bed, node)
        bed.sh("head", "rm -rf /home/alice/launch")


def _ask(lab: Lab, job: str, answers: list[tuple[float, str]], until: float) -> bool:
    """Ask for the status once; True when the fault has lasted long enough."""
    began = time.monotonic()
    state = lab.status(job)["state"]
    answers.append((time.monotonic() - began, state))
    assert state not in ENDED or state == "FAILED", state
    return time.monotonic() > until


def _may_need_a_restart(lab: Lab, job: str) -> None:
    """A save that met the full disk ends the job and says so; there is room again now."""
    view = lab.status(job)
    if view["state"] in ENDED:
        assert view["reason"] == "disk full", view
        lab.launch("restart", job)
