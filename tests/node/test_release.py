"""What SLURM holds because a node could not start it goes on by itself, a few times; every other hold stays."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from cluster.contract import RunDir
from cluster.errors import Refused
from cluster.node import details, release, resubmit, view
from cluster.node.control import Restart
from tests.slurm.fake import FakeSlurm
from tests.slurm.recorded import Answer

from .scheduled import queued, slurm_run

HELD = "launch failed requeued held"


@pytest.fixture
def job(tmp_path: Path) -> RunDir:
    return slurm_run(tmp_path, "a-0000a1", (), ["7"], started=False)


def asked(job: RunDir) -> dict[str, Any]:
    """What `status` says, of a queue that is asked anew."""
    (job.path.parent.parent / ".launch" / "slurm" / "queue.json").unlink(missing_ok=True)
    return view.status({"workdir": str(job.path.parent.parent)}, None)


def later(job: RunDir) -> None:
    """The last release is a while ago."""
    lines = [json.loads(line) for line in job.releases.read_text().splitlines()]
    job.releases.write_text("".join(json.dumps(one | {"t": one["t"] - release.APART_S}) + "\n" for one in lines))


def released(slurm: FakeSlurm) -> list[str]:
    return [call[2] for call in slurm.calls() if call[:2] == ["scontrol", "release"]]


def test_it_goes_on_three_times_not_at_once_and_then_waits_for_a_person(fake_slurm: FakeSlurm, job: RunDir) -> None:
    fake_slurm.jobs(queued("7", Reason=HELD, PriorityLong="0"))
    first = asked(job)
    assert first["jobs"][0]["state"] == "PENDING"
    assert first["notes"] == ["a-0000a1: its node could not start it, and SLURM held it; released (1 of 3)"]
    assert "to be released in 30 s (2 of 3)" in asked(job)["jobs"][0]["detail"] and released(fake_slurm) == ["7"]
    for _ in range(4):
        later(job)
        last = asked(job)
    assert released(fake_slurm) == ["7"] * 3
    assert "could not start it 4 times" in last["jobs"][0]["detail"] and "launch restart" in last["jobs"][0]["detail"]
    resubmit.resubmit(job, last["jobs"][0], job.attempt(0), Restart("me@here"), ["python"])
    later(job)
    assert asked(job)["notes"] and released(fake_slurm) == ["7"] * 5
    told = [one["text"] for one in details.show({"run_dir": str(job.path)}, None)["events"]]
    assert len(told) == 5 and told[3].endswith("released by me@here")


@pytest.mark.parametrize("reason", ["JobHeldUser", "JobHeldAdmin", "job requeued in held state"])
def test_a_hold_by_somebody_stays(fake_slurm: FakeSlurm, job: RunDir, reason: str) -> None:
    fake_slurm.jobs(queued("7", Reason=reason, PriorityLong="0"))
    assert asked(job)["notes"] == [] and released(fake_slurm) == []


def test_what_was_asked_to_stop_is_not_let_go(fake_slurm: FakeSlurm, job: RunDir) -> None:
    fake_slurm.jobs(queued("7", Reason=HELD, PriorityLong="0"))
    (job.control / "stop").write_text('{"by": "me@here"}')
    assert asked(job)["notes"] == [] and released(fake_slurm) == []


def test_a_refusal_is_said(fake_slurm: FakeSlurm, job: RunDir) -> None:
    fake_slurm.jobs(queued("7", Reason=HELD, PriorityLong="0"))
    fake_slurm.say("scontrol", Answer("", "slurm_update error: Access/permission denied\n", 1))
    seen = asked(job)["jobs"][0]
    assert "could not be released: scontrol: slurm_update error: Access/permission denied" in seen["detail"]
    with pytest.raises(Refused, match="could not be released"):
        release.by_person(job, seen, "me@here")
