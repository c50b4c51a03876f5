"""Sentences about what was done, and what `show` says of changes and endings."""
from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest

from cluster.events import Reason
from launcher import api, details, sentences, views
from launcher.commands import submit
from launcher.errors import Interrupted
from launcher.restart import Restarted
from launcher.submit import Submitted
from tests.launcher.test_views import JOB

PATCH = """\
diff --git a/train.py b/train.py
index 8fd55fe..88ff689 100644
--- a/train.py
+++ b/train.py
@@ -1,3 +1,3 @@
 import sys
--- a comment of SQL
++++ more
+new
diff --git "a/a b/\\354\\245\\220.png" "b/a b/\\354\\245\\220.png"
Binary files differ
diff --cc merged.py
index 1,2..3
@@@ -1,1 -1,1 +1,2 @@@
++both
"""
KILLED = replace(JOB, state="CANCELLED", reason=Reason.KILLED.value, checkpoint_step=30, ended_at=1100.0,
                 detail="by mina@lab: ended by SIGKILL at step 66, checkpoint at step 30")


def test_a_killed_job_says_once_who_did_it_and_where_it_can_go_on() -> None:
    line = views.status_table([KILLED], now=1250.0).split("\n")[1]
    assert line.endswith("killed by mina@lab; checkpoint at step 30")
    assert sentences.fate(KILLED).split("\n")[0] == "phase3-7kq2x9 CANCELLED: killed by mina@lab"


def test_the_details_of_a_kill_and_of_a_restart_are_in_show() -> None:
    assert views.ending(Reason.KILLED.value, KILLED.detail) == (
        "killed by mina@lab", "ended by SIGKILL at step 66, checkpoint at step 30")
    again = views.ending(Reason.RESTART_ASKED.value, "by mina@lab: at step 3")
    assert again == ("restart asked by mina@lab", "at step 3")
    assert views.ending(Reason.ERROR.value, "by: x") == ("error in the program", "by: x")


def test_a_patch_is_told_by_its_files() -> None:
    changed = details.changed_files(PATCH)
    assert changed["train.py"] == (2, 1)
    assert list(changed.values())[1:] == [(0, 0), (1, 0)] and list(changed)[2] == "merged.py"
    assert details.changed_files("") == {}


def test_a_log_that_shows_nothing_says_why() -> None:
    failed = replace(JOB, state="FAILED", reason="could not be started", detail="command not found: x")
    assert sentences.silent(failed, None).endswith("FAILED: could not be started: command not found: x")
    assert sentences.silent(failed, "loss") == "no line matches"


def test_only_a_running_job_has_a_speed() -> None:
    assert "it/s" not in views.status_table([KILLED], now=1250.0)


def test_a_restart_says_from_where() -> None:
    assert "attempt 1, from step 30\n" in sentences.restarted(Restarted("x-1", "gpu05", 1, 30))
    assert ", from /w/last.ckpt\n" in sentences.restarted(Restarted("x-1", "gpu05", 1, None, "/w/last.ckpt"))
    assert "no checkpoint" in sentences.restarted(Restarted("x-1", "gpu05", 1, None))


def test_a_submit_names_all_machines_and_slurms_number() -> None:
    both = Submitted("phase1-7kq2x9", "gpu01", "/w/runs/phase1-7kq2x9", 7, 0, place="gpu01,gpu02")
    assert sentences.submitted(both, (), False).startswith("phase1-7kq2x9 on gpu01,gpu02: /w/runs/")
    queued = Submitted("phase1-7kq2x9", "lab", "/w/runs/phase1-7kq2x9", None, 0, "27", "lab:low")
    assert sentences.submitted(queued, (), False).startswith("phase1-7kq2x9 on lab:low, SLURM job 27: /w/runs/")


@pytest.mark.parametrize(("where", "said"), [("draft", "nothing was submitted"), ("send", "whether x-1 was submitted")])
def test_ctrl_c_in_a_submit_says_what_it_leaves_behind(
        monkeypatch: pytest.MonkeyPatch, where: str, said: str) -> None:
    def cut_off(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    ready = SimpleNamespace(spec=SimpleNamespace(id="x-1"), notes=())
    monkeypatch.setattr(api, "draft", lambda *_, **__: ready)
    monkeypatch.setattr(api, where, cut_off)
    with pytest.raises(Interrupted, match=said):
        submit.run(["--", "true"])
