"""Ways in which a training is cut off, and what must hold after each of them."""
from __future__ import annotations

import random

from cluster.contract import RunDir, merged_metrics
from tests.helpers import TIMES, wait_until
from tests.testbed.testbed import Testbed

from .conftest import on_this_machine
from .lab import Lab

KINDS = ("kill", "rank", "torchrun", "supervisor", "save")
_references: dict[tuple[int, int], list[dict]] = {}


def reference(lab: Lab, ranks: int, total: int = 60) -> list[dict]:
    """The metrics of a run that nothing happened to; made once for each number of ranks and steps, anywhere."""
    if (ranks, total) in _references:
        return _references[ranks, total]
    job = lab.submit("tiny", "--set", "pace_s=0", "--set", f"steps={total}", *sized(ranks))
    lab.launch("wait", job)
    lines = steps(lab, job)
    assert [line["step"] for line in lines] == list(range(1, total + 1))
    _references[ranks, total] = lines
    return lines


def sized(ranks: int) -> list[str]:
    return ["--set", f"resources.procs={ranks}"]


def steps(lab: Lab, job: str) -> list[dict]:
    run = RunDir(lab.seen_here(lab.run_dir(job)))
    return [{key: value for key, value in line.items() if key not in TIMES}
            for line in merged_metrics(run) if "event" not in line]


def cut_and_resume(lab: Lab, bed: Testbed, kind: str, ranks: int, seed: int) -> tuple[int, list[dict]]:
    """-> (the step at which it was cut, the merged metrics after it was resumed to its end)."""
    draw = random.Random(f"{kind}-{ranks}-{seed}")
    at = draw.randint(12, 38)
    victim = draw.randrange(ranks)
    print(f"{kind}: seed {seed}, {ranks} ranks, cut at step >= {at}" + (f", rank {victim}" if kind == "rank" else ""))
    dying = ["--set", f"die_in_save={draw.randint(2, 4)}"] if kind == "save" else []
    job = lab.submit("tiny", *sized(ranks), *dying)
    run = RunDir(on_this_machine(bed, lab.run_dir(job)))
    if kind != "save":
        wait_until(lambda: last_step(run) >= at, 60, f"{job} at step {at}")
    cut = last_step(run)
    if kind == "kill":
        lab.launch("kill", job)
        view = lab.status(job)
        assert view["state"] == "CANCELLED" and view["checkpoint_step"] >= cut, view
        lab.launch("restart", job)
    elif kind == "rank":
        signal_pid(bed, lab, f"{lab.run_dir(job)}/attempts/000/ranks/{victim}.json")
    elif kind == "torchrun":
        bed.sh(lab.node, 'kill -9 "$(pgrep -u alice -f torch.distributed.run -o)"')
    elif kind == "supervisor":
        signal_pid(bed, lab, f"{lab.run_dir(job)}/attempts/000/heartbeat.json")
        lost = lab.wait_state(job, "FAILED")
        assert lost["reason"] == "supervisor lost", lost
        lab.launch("restart", job)
    lab.launch("wait", job, timeout_s=120)
    view = lab.status(job)
    assert view["state"] == "COMPLETED" and view["attempt"] == 1, view
    return cut, steps(lab, job)


def last_step(run: RunDir) -> int:
    return max((line["step"] for line in merged_metrics(run)), default=0)


def signal_pid(bed: Testbed, lab: Lab, path: str) -> None:
    line = """kill -9 "$(python3 -c 'import json, sys; print(json.load(open(sys.argv[1]))["pid"])' "$1")" """
    bed.sh(lab.node, line, path)
