"""One question to SLURM for many jobs, asked rarely, and never an ending where there was no answer."""
from __future__ import annotations

import threading
import time
from datetime import datetime
from pathlib import Path

import pytest

from cluster.node import queue as queue_module
from cluster.node import queue_memory
from cluster.node.queue import Queue
from cluster.node.slurm_words import Phase, in_line, ordinal, phase_of, reason_words, state_words
from tests.node.scheduled import accounted, queued
from tests.slurm.fake import FakeSlurm
from tests.slurm.recorded import Answer

DISABLED = Answer(stderr="Slurm accounting storage is disabled\n", code=1)
DOWN = Answer(stderr="slurm_load_jobs error: Unable to contact slurm controller (connect failure)\n", code=1)


@pytest.fixture
def later(monkeypatch: pytest.MonkeyPatch):
    """later(seconds): the clock that ages answers goes on."""
    ahead = [0.0]

    class Clock:
        monotonic, sleep = time.monotonic, time.sleep

        @staticmethod
        def time() -> float:
            return time.time() + ahead[0]

    monkeypatch.setattr(queue_memory, "time", Clock)
    monkeypatch.setattr(queue_module, "time", Clock)
    return lambda seconds: ahead.__setitem__(0, ahead[0] + seconds)


def test_many_jobs_cost_one_squeue_and_one_sacct(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    fake_slurm.jobs(*(queued(str(number), State="RUNNING", NodeList="gpu01") for number in range(1, 401)))
    fake_slurm.past(*(accounted(str(number), "TIMEOUT") for number in range(401, 501)))
    queue = Queue.ask(tmp_path, map(str, range(1, 501)))
    assert dict(fake_slurm.count()) == {"squeue": 1, "sacct": 1}
    assert {queue.about(str(number)).entry.state for number in range(1, 501)} == {"RUNNING", "TIMEOUT"}


def test_ten_thousand_forgotten_ids_are_asked_for_in_ten_pieces(
        fake_slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "ASK_S", 60.0)  # what starting ten fakes takes here is not what is asked
    queue = Queue.ask(tmp_path, map(str, range(10_000)))
    assert dict(fake_slurm.count()) == {"squeue": 1, "sacct": 10}
    assert max(len(call[-1].split(",")) for call in fake_slurm.calls()) == 1000
    assert all(queue.about(str(number)).gone for number in range(10_000))


def test_a_fresh_answer_is_used_by_everybody(fake_slurm: FakeSlurm, tmp_path: Path, later) -> None:
    fake_slurm.jobs(queued("7"))
    for _ in range(5):
        assert Queue.ask(tmp_path, ["7", "8"]).about("7").entry.id == "7"
    assert dict(fake_slurm.count()) == {"squeue": 1, "sacct": 1}
    later(2.5)
    Queue.ask(tmp_path, ["7"])
    assert fake_slurm.count()["squeue"] == 2


def test_clients_that_ask_at_the_same_time_share_one_question(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    fake_slurm.jobs(queued("7"))
    found = []
    clients = [threading.Thread(target=lambda: found.append(Queue.ask(tmp_path, ["7"]).about("7").entry.id))
               for _ in range(8)]
    for client in clients:
        client.start()
    for client in clients:
        client.join()
    assert found == ["7"] * 8 and fake_slurm.count()["squeue"] == 1


def test_a_dead_controller_changes_nothing_and_is_asked_ever_more_rarely(
        fake_slurm: FakeSlurm, tmp_path: Path, later) -> None:
    fake_slurm.jobs(queued("7", State="RUNNING"))
    Queue.ask(tmp_path, ["7", "8"])
    fake_slurm.say("squeue", DOWN)
    asked = []
    for _ in range(60):
        later(2.1)
        answer = Queue.ask(tmp_path, ["7", "8"]).about("7")
        assert answer.entry.state == "RUNNING" and not answer.gone
        assert "Unable to contact slurm controller" in answer.unasked and "what is shown it said" in answer.unasked
        asked.append(fake_slurm.count()["squeue"])
    assert asked[-1] - 1 == 6  # 2, 4, 8, 16, 32, 60 s apart
    assert not Queue.ask(tmp_path, ["8"]).about("8").gone
    fake_slurm.say("squeue")
    fake_slurm.jobs(queued("7", State="PENDING"))
    later(61)
    assert Queue.ask(tmp_path, ["7"]).about("7").unasked == ""


def test_who_waits_for_it_asks_a_controller_that_was_silent_soon_again(
        fake_slurm: FakeSlurm, tmp_path: Path, later) -> None:
    fake_slurm.say("squeue", DOWN)
    for _ in range(6):
        Queue.ask(tmp_path)
        later(100)
    Queue.ask(tmp_path)
    fake_slurm.say("squeue")
    fake_slurm.jobs(queued("7"))
    later(5)
    assert Queue.ask(tmp_path).unasked
    assert not Queue.ask(tmp_path, pause_max_s=4.0).unasked


def test_a_controller_that_hangs_is_given_up_in_time(
        fake_slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queue_module, "ASK_S", 0.3)
    fake_slurm.say("squeue", Answer(hang_s=5))
    began = time.monotonic()
    answer = Queue.ask(tmp_path, ["7"]).about("7")
    assert time.monotonic() - began < 2
    assert answer.unasked.startswith("squeue did not answer in 0.3") and not answer.gone and answer.entry is None
    assert fake_slurm.count()["sacct"] == 0


def test_without_accounting_squeue_alone_decides(fake_slurm: FakeSlurm, tmp_path: Path, later) -> None:
    fake_slurm.say("sacct", DISABLED)
    for _ in range(3):
        answer = Queue.ask(tmp_path, ["7"]).about("7")
        assert answer.gone and answer.unasked == ""
        later(10)
    assert fake_slurm.count()["sacct"] == 1


def test_a_dead_accounting_is_no_evidence(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    fake_slurm.say("sacct", Answer(stderr="sacct: error: Problem talking to the database: Connection refused\n", code=1))
    answer = Queue.ask(tmp_path, ["7"]).about("7")
    assert not answer.gone and answer.unasked == "sacct: Problem talking to the database: Connection refused"


def test_no_squeue_on_the_path_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert Queue.ask(tmp_path, ["7"]).about("7").unasked.startswith("there is no squeue on the PATH of ")


def test_a_full_disk_only_costs_the_memory(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    (tmp_path / ".launch").write_text("in the way")
    fake_slurm.jobs(queued("7"))
    assert Queue.ask(tmp_path, ["7"]).about("7").entry.id == "7"


def test_the_place_in_the_queue_is_among_those_who_wait_for_the_same_nodes(
        fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    fake_slurm.jobs(
        queued("1", PriorityLong="50", UserID="0"), queued("2", PriorityLong="90", UserID="0"),
        queued("3", PriorityLong="50"), queued("4", PriorityLong="0", Reason="JobHeldUser"),
        queued("5", PriorityLong="99", Reason="Dependency"), queued("6", PriorityLong="99", Partition="high"),
        queued("7", PriorityLong="40", Partition="main,high"), queued("8", State="RUNNING"))
    queue = Queue.ask(tmp_path)
    places = {id: (queue.about(id).entry.position, queue.about(id).entry.of) for id in "345678"}
    assert places == {"3": (3, 4), "4": (None, None), "5": (None, None), "6": (1, 2), "7": (2, 2), "8": (None, None)}


def test_the_points_of_an_array_are_known_one_by_one(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    """As 22.05 shows an array of which 4_1 runs, 4_2 waits, and 4_3, 4_4 were cancelled before they began."""
    fake_slurm.jobs(queued("4_1", JobID="9", State="RUNNING"), queued("4_2", JobID="4"))
    fake_slurm.past(accounted("4_[3-4%2]", "CANCELLED by 2001", JobIDRaw="4"), accounted("4_0", "COMPLETED", JobIDRaw="8"))
    queue = Queue.ask(tmp_path, ["4_0", "4_1", "4_2", "4_3"])
    assert [queue.about(f"4_{number}").entry.state for number in range(4)] == [
        "COMPLETED", "RUNNING", "PENDING", "CANCELLED"]
    assert queue.about("4_3").entry.canceller == "2001" and queue.about("9").entry.id == "4_1"
    assert [call[-1] for call in fake_slurm.calls() if call[0] == "sacct"] == ["4"]


def test_a_requeued_job_is_not_ended_in_accounting(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    fake_slurm.past(accounted("7", "REQUEUED"), accounted("8", "SOMETHING_NEW"))
    queue = Queue.ask(tmp_path, ["7", "8"])
    assert queue.about("7").entry is None and queue.about("8").entry is None


def test_odd_lines_are_passed_over(fake_slurm: FakeSlurm, tmp_path: Path) -> None:
    line = "7|7|RUNNING|None|main|1|1795277190|NONE|0|gpu01|0|launch:tok|a|b é|"
    fake_slurm.say("squeue", Answer(f"CLUSTER: lab\n\nslurmctld is busy\n{line}\n"))
    entry = Queue.ask(tmp_path, ["7"]).about("7").entry
    assert (entry.nodes, entry.comment, entry.name) == ("gpu01", "launch:tok", "a|b é")
    assert entry.starts_at == datetime.fromtimestamp(1795277190).timestamp()


def test_habits_of_the_person_do_not_change_the_answer(
        fake_slurm: FakeSlurm, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recorder = fake_slurm.bin / "squeue"
    recorder.write_text(f"#!/bin/sh\nenv > {tmp_path}/env\n")
    for name in ("SQUEUE_FORMAT", "SQUEUE_STATES", "SACCT_FORMAT"):
        monkeypatch.setenv(name, "x")
    Queue.ask(tmp_path)
    assert not [line for line in (tmp_path / "env").read_text().splitlines() if line.startswith(("SQUEUE_", "SACCT_"))]


def test_states_are_classified_by_ourselves_and_an_unknown_one_is_no_ending() -> None:
    endings = {"COMPLETED", "CANCELLED", "FAILED", "TIMEOUT", "DEADLINE", "PREEMPTED", "NODE_FAIL", "BOOT_FAIL",
               "OUT_OF_MEMORY"}
    others = {"PENDING", "CONFIGURING", "RUNNING", "SUSPENDED", "COMPLETING", "STOPPED", "SIGNALING", "STAGE_OUT",
              "RESIZING", "REQUEUED", "REQUEUE_FED", "REQUEUE_HOLD", "SPECIAL_EXIT", "RESV_DEL_HOLD"}
    unknown = {"REVOKED", "EXPEDITING", "", "ENDED"}
    assert all(phase_of(word) is Phase.ENDED for word in endings)
    assert all(phase_of(word) not in (Phase.ENDED, Phase.UNKNOWN) for word in others)
    assert all(phase_of(word) is Phase.UNKNOWN for word in unknown)
    assert state_words("EXPEDITING") == "SLURM says EXPEDITING" and state_words("RUNNING") == ""


@pytest.mark.parametrize(("reason", "words"), [
    ("Priority", "Priority"), ("(Resources)", "Resources"), ("None", ""),
    ("Dependency", "waits for another job"),
    ("ReqNodeNotAvail, UnavailableNodes:gpu02", "the node it asks for is not available (gpu02)"),
    ("QOSMaxJobsPerUserLimit", "the limits of its QOS are used up (QOSMaxJobsPerUserLimit)"),
    ("AssocGrpGRES", "the limits of its account are used up (AssocGrpGRES)"),
    ("launch failed requeued held", "its node could not start it, and SLURM holds it"),
    ("Nodes required for job are DOWN, DRAINED or reserved for jobs in higher priority partitions",
     "nodes it asks for are down, drained or reserved"),
    ("JobHeldAdmin", "held by an administrator"), ("SomethingNew", "SomethingNew"),
])
def test_why_it_waits_is_said_in_a_persons_words(reason: str, words: str) -> None:
    assert reason_words(reason) == words


def test_who_stands_in_line() -> None:
    assert in_line("Priority", 5) and in_line("Resources", 5) and in_line("", 5) and in_line("QOSMaxGRESPerUser", 5)
    assert not in_line("Priority", 0) and not in_line("BeginTime", 5) and not in_line("JobHeldUser", 5)
    assert [ordinal(number) for number in (1, 2, 3, 4, 11, 12, 13, 21, 102, 111)] == [
        "1st", "2nd", "3rd", "4th", "11th", "12th", "13th", "21st", "102nd", "111th"]
