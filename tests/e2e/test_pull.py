"""What is fetched is what the job left, also when the link is cut on the way, and no byte travels twice."""
from __future__ import annotations

import json
import subprocess
import time
from contextlib import ExitStack
from pathlib import Path

import pytest

from cluster.contract import sha256_file
from tests.helpers import wait_until
from tests.testbed.testbed import Testbed

from .lab import Lab

MAKE = 'd="$LAUNCH_RUN_DIR/artifacts/samples"; mkdir -p "$d"; head -c $1 /dev/urandom > "$d/big"; echo small > "$d/a b"'
MB = 1 << 20


def made(lab: Lab, size: int) -> tuple[str, Path]:
    """A job that left an artifact of this many bytes, and where it lies."""
    job = lab.submit("--", "sh", "-c", MAKE, "sh", str(size))
    lab.launch("wait", job)
    return job, lab.seen_here(lab.run_dir(job)) / "artifacts" / "samples"


def cut(testbed: Testbed, node: str) -> None:
    """Every connection of alice breaks, and for a moment there is none to be had."""
    with testbed.sshd_killed(node):
        testbed.exec(node, "pkill", "-9", "-u", "alice", "sshd", check=False)


def pulled_with_cuts(lab: Lab, testbed: Testbed, size: int, *at: int) -> dict:
    """Pull while the link is cut whenever so many bytes are here -> what --json says."""
    job, there = made(lab, size)
    part = lab.project / job / "artifacts" / "samples" / ".big.part"
    command, output, said = lab.command("pull", job, "--json"), lab.home / "pulled", lab.home / "said"
    with open(output, "wb") as out, open(said, "wb") as err, ExitStack() as stack:
        client = subprocess.Popen(command.argv, cwd=command.cwd, env=command.env, stdin=subprocess.DEVNULL, stdout=out,
                                  stderr=err)
        stack.callback(client.wait)
        stack.callback(client.kill)
        for mark in at:
            wait_until(lambda mark=mark: part.exists() and part.stat().st_size >= mark, 120, f"{mark} bytes are here")
            cut(testbed, lab.node)
            assert part.exists(), "it was over before the link was cut"
        assert client.wait(300) == 0, said.read_text()
    assert said.read_text().count("the link is lost") == len(at)
    for name in ("big", "a b"):
        assert sha256_file(there / name) == sha256_file(part.with_name(name))
    assert not part.exists()
    return json.loads(output.read_bytes())


def test_a_cut_on_the_way(lab: Lab, testbed: Testbed) -> None:
    with testbed.slow_link(lab.node, delay_ms=120):  # so that it lasts for seconds
        told = pulled_with_cuts(lab, testbed, 12 * MB, 200_000)
    assert told["fetched_bytes"] == told["bytes"] == 12 * MB + 6 and not told["problems"]


@pytest.mark.campaign
def test_500_mb_and_two_cuts(lab: Lab, testbed: Testbed) -> None:
    began = time.monotonic()
    told = pulled_with_cuts(lab, testbed, 500 * MB, 100 * MB, 300 * MB)
    print(f"500 MB with two cuts: {time.monotonic() - began:.1f} s, {told['fetched_bytes']} bytes travelled")
    assert told["fetched_bytes"] == told["bytes"] == 500 * MB + 6 and not told["problems"]
