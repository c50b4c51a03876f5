"""A job that stands still: which rank is where, found without harm to anybody."""
from __future__ import annotations

import os
import signal
import socket
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cluster.contract import STACK_SIGNAL, RunDir
from cluster.events import Fired
from cluster.node import evidence, process, sockets
from cluster.spec import Guard
from tests.helpers import wait_until
from tests.node import conftest
from tests.node.conftest import Job

# Three lines, then rank 1 sleeps for ever and rank 0 waits for it in a collective.
HANGS = """
import faulthandler, json, os, signal, sys, time
faulthandler.register(signal.SIGURG, all_threads=True)
import torch.distributed as dist
dist.init_process_group("gloo")
attempt = os.path.join(os.environ["LAUNCH_RUN_DIR"], "attempts", f"{int(os.environ['LAUNCH_ATTEMPT']):03d}")

def train(step):
    if dist.get_rank() == 1 and step > 4:
        time.sleep(600)
    dist.barrier()

for step in range(1, 9):
    train(step)
    if dist.get_rank() == 0:
        with open(os.path.join(attempt, "metrics.jsonl"), "a") as file:
            file.write(json.dumps({"t": time.time(), "step": step, "total": 100, "loss": 1 / step}) + "\\n")
"""
LISTENS = "import faulthandler, signal, sys, time\nfaulthandler.register(signal.SIGURG, all_threads=True)\n" \
          "def deep():\n    print('ready', flush=True)\n    time.sleep(600)\ndeep()\n"
DEAF = LISTENS.replace("faulthandler.register(signal.SIGURG, all_threads=True)", "")
SPY = """#!/bin/sh
[ "$1 $2 $3" = "dump --nonblocking --pid" ] || exit 9
{body}
"""
DUMP = """cat <<END
Process $4: python train.py
Python v3.11.2 (/usr/bin/python3.11)

Thread $4 (idle): "MainThread"
    wait (threading.py:324)
    deep (train.py:5)
    <module> (train.py:6)
Thread 99 (active): "other"
    work (train.py:9)
END"""


@pytest.fixture
def start(tmp_path: Path) -> Iterator[Callable[..., process.Proc]]:
    """start(source) -> the process, which has said `ready`; what it writes goes to logs/rank-0.log of `attempt`."""
    made: list[subprocess.Popen[bytes]] = []

    def begin(source: str, **env: str) -> process.Proc:
        log = tmp_path / "run" / "attempts" / "000" / "logs" / f"rank-{len(made)}.log"
        log.parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "train.py").write_text(source)
        with open(log, "ab") as out:
            made.append(subprocess.Popen([sys.executable, str(tmp_path / "train.py")], stdout=out, stderr=out,
                                         env={**os.environ, **env}))
        wait_until(lambda: b"ready" in log.read_bytes())
        found = process.read_process(made[-1].pid)
        assert found
        return found

    yield begin
    for one in made:
        one.kill()
        one.wait()


def looked_at(tmp_path: Path, *processes: process.Proc) -> tuple[str, str]:
    return evidence.collect(RunDir(tmp_path / "run").attempt(0), processes, ())


def spy(tmp_path: Path, body: str) -> str:
    """A PATH with a py-spy that answers so."""
    program = tmp_path / "bin" / "py-spy"
    program.parent.mkdir()
    program.write_text(SPY.format(body=body))
    program.chmod(0o755)
    return f"{program.parent}:{os.environ['PATH']}"


def test_who_listens_tells_its_stack_and_who_does_not_is_not_harmed(start: Callable, tmp_path: Path) -> None:
    listens, deaf = start(LISTENS), start(DEAF)
    assert evidence.catches(listens.pid) and not evidence.catches(deaf.pid)
    said, report = looked_at(tmp_path, listens)
    assert f"is in deep ({tmp_path / 'train.py'}:5)" in said
    assert f"by {STACK_SIGNAL.name}" in report and "state S" in report and "Current thread" in report
    said, report = looked_at(tmp_path, deaf)
    assert "it does not listen to SIGURG; py-spy is not installed" in report
    assert process.alive(*deaf.identity) and process.alive(*listens.identity)


def test_py_spy_is_asked_where_it_is_and_its_refusal_is_told(start: Callable, tmp_path: Path) -> None:
    allowed = start(DEAF, PATH=spy(tmp_path, DUMP))
    said, report = looked_at(tmp_path, allowed)
    assert said == f"process {allowed.pid} is in wait (threading.py:324)" and "stack by py-spy" in report
    (tmp_path / "bin" / "py-spy").write_text(SPY.format(body="echo 'Error: Permission Denied' >&2; exit 1"))
    assert "py-spy was refused: Error: Permission Denied" in looked_at(tmp_path, allowed)[1]


def test_what_is_no_python_is_told_by_its_state_and_its_sockets(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as server:
        port = server.getsockname()[1]
        with socket.create_connection(("127.0.0.1", port)) as client:
            client.sendall(b"unread")
            there, _ = server.accept()
            with there:
                said = wait_until(lambda: [line for line in sockets.of(os.getpid()) if "6 bytes not read" in line])
                assert said == [f"tcp 127.0.0.1:{port} -> 127.0.0.1:{client.getsockname()[1]} ESTABLISHED, "
                                "6 bytes not read"]
                assert f"tcp 127.0.0.1:{port} LISTEN" in sockets.of(os.getpid())
    sleeper = subprocess.Popen(["sleep", "600"])
    try:
        wait_until(lambda: process.command_of(sleeper.pid) == ["sleep", "600"])
        found = process.read_process(sleeper.pid)
        said, report = looked_at(tmp_path, found)
        assert "state " in said and "no stack" not in said and "no stack: it is no Python" in report and sleeper.poll() is None
    finally:
        sleeper.kill()
        sleeper.wait()


def test_a_hang_names_the_rank_that_does_not_take_part(
        make_job: Callable[..., Job], script: Callable[[str], str], monkeypatch: pytest.MonkeyPatch) -> None:
    soon = "from cluster.node import thresholds, guarding; thresholds.STALL_S = guarding.PAUSE_S = 1.0; "
    monkeypatch.setattr(conftest, "SUPERVISE", soon + conftest.SUPERVISE)
    source = script(HANGS)
    job = make_job("torchrun", source, procs=2, grace_s=0.0, guards=(Guard("stalled", "checkpoint-and-stop"),)).start()
    status = job.ended(60)
    fired = [event for event in job.events if isinstance(event, Fired)]
    assert [(one.rule, one.severity, one.policy) for one in fired] == [("stalled", "error", "checkpoint-and-stop")]
    line = HANGS.splitlines().index("        time.sleep(600)") + 1
    assert f"rank 1 is in train ({source}:{line}); rank 0 waits in a collective, in train ({source}:{line + 1})" \
        in fired[0].what
    report = (job.run.path / (fired[0].evidence or "")).read_text()
    assert report.count("Current thread") == 2 and "127.0.0.1" in report
    assert status.reason.value == "stopped by a guard" and "stalled" in status.detail
    assert signal.SIGURG == STACK_SIGNAL
