"""A log is followed to its last byte, at any speed, over a link that is cut, in constant memory."""
from __future__ import annotations

import re
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.contract import RunDir, sha256_file
from tests.helpers import wait_until
from tests.testbed.testbed import Testbed

from .lab import Lab, Started
from .test_pull import MB, cut

STAGE = "about: prints as fast as it can\ntorchrun: flood.py\nresources: {gpus: 0, procs: 2}\nrestart: {max_restarts: 0}\n"
FLOOD = """
import os, sys
rank, left = os.environ["RANK"], %d
line = 0
while left > 0:
    block = b"".join(b"rank %%s line %%d %%s\\n" %% (rank.encode(), line + n, b"x" * (n %% 90)) for n in range(2000))
    line += 2000
    os.write(1 + line // 2000 %% 2, block)
    left -= len(block)
"""
SIZE = 100 * MB  # of each of the two ranks
MEMORY_MB = 120  # of a client that follows: Python, paramiko, and what is on its way


def link_pulled(seconds: float) -> Callable[[Testbed, str], None]:
    """The cable is out for so long; meanwhile the node has forgotten the connections."""
    def pull(testbed: Testbed, node: str) -> None:
        with testbed.link_down(node):
            testbed.exec(node, "pkill", "-9", "-u", "alice", "sshd", check=False)
            until = time.monotonic() + seconds
            wait_until(lambda: time.monotonic() > until, seconds + 5)

    return pull


def peak_mb(pid: int) -> float:
    found = re.search(r"VmHWM:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1000 if found else 0.0


@pytest.mark.campaign
def test_200_mb_of_two_ranks_and_three_cuts(lab: Lab, testbed: Testbed) -> None:
    (lab.project / "configs" / "stages" / "flood.yaml").write_text(STAGE)
    (lab.project / "flood.py").write_text(FLOOD % SIZE)
    job = lab.submit("flood")
    began = time.monotonic()
    followers = [lab.start("logs", job, "--follow", "--rank", str(rank)) for rank in (0, 1)]
    peaks = [0.0, 0.0]

    def arrived(follower: Started, mark: int) -> bool:
        for number, one in enumerate(followers):
            if one.process.poll() is None:
                peaks[number] = max(peaks[number], peak_mb(one.process.pid))
        return follower.output.stat().st_size >= mark

    for mark, fault in ((20, cut), (45, link_pulled(5)), (70, link_pulled(25))):
        wait_until(lambda mark=mark: arrived(followers[0], mark * MB), 300, f"{mark} MB have arrived")
        assert followers[0].output.stat().st_size < SIZE, "it was over before the link was cut"
        fault(testbed, lab.node)
    wait_until(lambda: arrived(followers[0], SIZE) and arrived(followers[1], SIZE), 300, "all has arrived")
    assert [follower.process.wait(120) for follower in followers] == [0, 0]
    took = time.monotonic() - began
    attempt = RunDir(lab.seen_here(lab.run_dir(job))).attempts()[-1]
    assert attempt.number == 0
    for rank, follower in enumerate(followers):
        assert sha256_file(follower.output) == sha256_file(attempt.rank_log(rank))
    print(f"200 MB of two ranks with three cuts: {took:.1f} s; memory of the followers {peaks[0]:.0f}, {peaks[1]:.0f} MB")
    assert max(peaks) < MEMORY_MB
