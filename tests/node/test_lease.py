"""GPUs are leased: never shared by accident, given back when the supervisor dies, and who has them is said."""
from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace

import pytest

from cluster.events import AttemptStarted, Launched, Reason
from cluster.node import control, lease, leasing, process
from cluster.node.gpus import Gpu
from cluster.node.lease import Claim, Lease
from tests.helpers import wait_until
from tests.node.cards import Cards
from tests.node.conftest import Job

HOLD = ("sh", "-c", "echo $CUDA_VISIBLE_DEVICES; exec sleep 60")


@pytest.fixture
def job(cards: Cards, make_job: Callable[..., Job]) -> Callable[..., Job]:
    """job(2) -> a started job that holds two GPUs until it is killed."""
    def start(gpus: int, *argv: str, **fields: object) -> Job:
        return make_job("command", *(argv or HOLD), gpus=gpus, **fields).start(PATH=cards.path)

    return start


@pytest.fixture
def stranger() -> Iterator[subprocess.Popen[bytes]]:
    """Somebody's plain `python train.py`."""
    found = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)", "train.py"])
    yield found
    found.kill()
    found.wait()


def waits(one: Job) -> str:
    return (process.read_heartbeat(one.attempt) or {}).get("waits") or ""


def gpus_of(one: Job, cards: Cards) -> list[int]:
    wait_until(one.log, 15, "what GPUs it has")
    return cards.numbers(one.log())


def test_a_lease_is_told_kept_by_the_next_attempt_and_free_when_its_supervisor_is_killed(
        job: Callable[..., Job], cards: Cards) -> None:
    first = job(3)
    assert gpus_of(first, cards) == [0, 1, 2]
    wait_until(lambda: [one.gpus for one in first.events if isinstance(one, Launched)] == [cards.uuids[:3]], 5, "told")
    second = job(2)
    wait_until(lambda: waits(second), 15, "somebody in the way")
    said = rf"local GPU 0: \w+ job {first.spec.id} pid {first.supervisor.pid} since \d\d:\d\d; GPU 1: .*; GPU 2: .*"
    assert re.fullmatch(said, waits(second)), waits(second)
    (before,) = lease.holders()[cards.uuids[0]]
    first.ask(control.Restart("me@here"))
    wait_until(lambda: sum(isinstance(event, AttemptStarted) for event in first.events) == 2, 15, "another attempt")
    assert gpus_of(first, cards) == [0, 1, 2] and lease.holders()[cards.uuids[0]] == [before]
    assert waits(second)
    os.kill(first.supervisor.pid, signal.SIGKILL)
    first.supervisor.wait()
    assert gpus_of(second, cards) == [0, 1]
    second.stop(now=True)
    assert not set(lease.holders()) & set(cards.uuids)


def test_a_foreign_process_blocks_its_gpu_and_no_other(job: Callable[..., Job], cards: Cards,
                                                        stranger: subprocess.Popen[bytes]) -> None:
    cards.use((2, stranger.pid, 72704))
    three = job(3)
    assert gpus_of(three, cards) == [0, 1, 3]
    four = job(1)
    wait_until(lambda: waits(four), 15, "somebody in the way")
    assert re.search(rf"local GPU 0: .*; GPU 2: \w+ pid {stranger.pid} python 71 GB since \d\d:\d\d; GPU 3: ", waits(four))
    cards.use()
    stranger.kill()
    stranger.wait()
    assert gpus_of(four, cards) == [2]


def test_a_restart_with_other_gpus_gives_up_what_it_has(job: Callable[..., Job], cards: Cards) -> None:
    one, other = job(1), job(1)
    assert [gpus_of(one, cards), gpus_of(other, cards)] in ([[0], [1]], [[1], [0]])
    one.ask(control.Restart("me@here", spec=replace(one.spec, gpus=4).to_json().decode()))
    wait_until(lambda: f"job {other.spec.id} pid" in waits(one), 15, "the other in its way")
    assert len(lease.holders().keys() & {*cards.uuids}) == 1
    other.stop(now=True)
    assert gpus_of(one, cards) == [0, 1, 2, 3]


def test_memory_that_nobody_is_seen_to_use_is_somebodys(job: Callable[..., Job], cards: Cards) -> None:
    cards.use(pinned=(0, 1, 2))
    waiting = job(2)
    wait_until(lambda: "GPU 0: 29 GB in use, by no process that the driver shows" in waits(waiting), 15, "a reason")
    cards.use(pinned=(2,))
    assert gpus_of(waiting, cards) == [0, 1]


def test_first_come_first_served(job: Callable[..., Job], cards: Cards) -> None:
    holder = job(1)
    wait_until(holder.log, 15)
    large = job(4)
    wait_until(lambda: waits(large), 15)
    small = job(1)  # three are free, and the other was first
    wait_until(lambda: "comes first" in waits(small), 15, "its turn")
    assert f"job {large.spec.id} waits for 4 GPUs since" in waits(small)
    holder.stop(now=True)
    assert gpus_of(large, cards) == [0, 1, 2, 3] and not small.log()
    large.supervisor.send_signal(signal.SIGKILL)
    large.supervisor.wait()
    assert gpus_of(small, cards) == [0]


def test_one_that_gives_up_lets_the_next_go_on(job: Callable[..., Job], cards: Cards) -> None:
    holder = job(3)
    wait_until(holder.log, 15)
    large, small = job(4), None
    wait_until(lambda: waits(large), 15)
    small = job(1)
    wait_until(lambda: "comes first" in waits(small), 15, "its turn")
    assert large.stop(now=True).reason is Reason.KILLED
    assert gpus_of(small, cards) == [3]


def test_jobs_that_share_have_one_gpu_and_the_others_none_of_it(job: Callable[..., Job], cards: Cards) -> None:
    one, two = job(1, gpu_share=True), job(1, gpu_share=True)
    assert gpus_of(one, cards) == gpus_of(two, cards) == [0]
    alone = job(4)
    wait_until(lambda: re.search(r"GPU 0: \w+ job \S+ \(shared\)", waits(alone)), 15, waits(alone))


def test_a_rank_inherits_nothing_of_the_lease(job: Callable[..., Job], cards: Cards) -> None:
    listing = job(1, "sh", "-c", "ls -l /proc/self/fd")
    listing.ended()
    assert "rank-0.log" in listing.log() and "launch-gpu" not in listing.log()


def test_jobs_that_ask_for_none_get_none_and_too_many_are_said(job: Callable[..., Job], cards: Cards) -> None:
    without = job(0, "printenv", "CUDA_VISIBLE_DEVICES")
    assert without.ended().reason is Reason.DONE and without.log() == "\n"
    much = job(5).ended()
    assert much.reason is Reason.CANNOT_START and "asks for 5 GPUs, this node has 4" in much.detail


# --- the files ----------------------------------------------------------------------------------------------

def gpu(cards: Cards, index: int = 0) -> Gpu:
    return Gpu(index, cards.uuids[index], "H100", 80000, 0, "550")


def taken(cards: Cards, shared: bool = False) -> Lease:
    claim = Claim("job-1", 1, shared=shared)
    return Lease(claim, [gpu(cards)], lease.lock_all([cards.uuids[0]], shared))


def test_a_lock_that_somebody_removed_is_made_again(cards: Cards) -> None:
    mine = taken(cards)
    for path in lease.DIRECTORY.glob(f"launch-gpu-{cards.uuids[0]}.*"):
        path.unlink()
    assert mine.keep() == [] and lease.lock(lease.lock_path(cards.uuids[0]), False) is None
    assert [one.claim.job for one in lease.holders()[cards.uuids[0]]] == ["job-1"]
    lease.lock_path(cards.uuids[0]).unlink()
    other = lease.lock(lease.lock_path(cards.uuids[0]), False)
    assert other is not None and mine.keep() == [0]
    os.close(other)
    mine.close()
    assert cards.uuids[0] not in lease.holders()


def test_what_the_dead_say_is_not_believed(cards: Cards) -> None:
    mine = taken(cards)
    (path,) = lease.DIRECTORY.glob(f"launch-gpu-{cards.uuids[0]}.*.holder")
    said = path.read_text()
    assert leasing.in_the_way([gpu(cards)], ())[cards.uuids[0]].startswith("root job job-1" if os.geteuid() == 0 else "")
    path.write_text(re.sub(r'"started": \d+', '"started": 1', said))
    assert lease.holders().get(cards.uuids[0]) is None and not path.exists()
    mine.close()


@pytest.mark.parametrize(("a", "b", "meet"), [
    (Claim("a", 1), Claim("b", 1), True), (Claim("a", 1, (0, 1)), Claim("b", 1, (2,)), False),
    (Claim("a", 1, (0, 1)), Claim("b", 1, (1,)), True), (Claim("a", 1, shared=True), Claim("b", 1, shared=True), False),
    (Claim("a", 1, shared=True), Claim("b", 1), True)])
def test_only_who_wants_the_same_waits_for_another(a: Claim, b: Claim, meet: bool) -> None:
    assert a.meets(b) is b.meets(a) is meet


@pytest.fixture
def orphan() -> Iterator[int]:
    """A process that nobody here has started."""
    pid = int(subprocess.run(["sh", "-c", "sleep 60 >/dev/null 2>&1 & echo $!"], capture_output=True, check=True).stdout)
    yield pid
    os.kill(pid, signal.SIGKILL)


def test_who_computes_on_a_leased_gpu_is_said_once(cards: Cards, orphan: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", cards.path)
    monkeypatch.setattr(leasing, "LOOK_S", 0.0)
    mine = taken(cards)
    cards.use((0, orphan, 4096), (1, orphan, 4096))
    asked: list[tuple[object, ...]] = []

    class AtOnce:
        def __init__(self, function: Callable[..., object], *args: object) -> None:
            asked.append(args)
            self._found = function(*args)

        def done(self) -> bool:
            return True

        def result(self) -> object:
            return self._found

    neighbours = leasing.Neighbours(mine, AtOnce)  # type: ignore[arg-type]
    (said,) = neighbours.news()
    assert f"pid {orphan} sleep 4 GB since" in said and neighbours.news() == [] and len(asked) == 2
    assert leasing.strangers([cards.uuids[0]], orphan) == [], "the job's own processes are none"
    mine.close()
