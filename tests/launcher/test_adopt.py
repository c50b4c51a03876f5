"""`launch adopt`: a program that nobody launched becomes a job, and no more is said of it than is known."""
from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cluster.contract import RunDir
from cluster.node import process, trees
from cluster.node.adopt import PROGRESS, separated
from tests.helpers import wait_until

from .conftest import Person

PROGRAM = """\
import subprocess, sys
child = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(999)"], start_new_session=True)
print("child", child.pid, flush=True)
for line in sys.stdin:
    print(line, end="", flush=True)
child.kill()
child.wait()
"""


@contextmanager
def by_hand(directory: Path) -> Iterator[subprocess.Popen[str]]:
    """A program whose output goes to a file, as nohup has it; what it is told it prints, then it ends."""
    directory.mkdir(exist_ok=True)
    with open(directory / "out.log", "wb") as log, subprocess.Popen(
            [sys.executable, "-c", PROGRAM], cwd=directory, stdin=subprocess.PIPE, stdout=log, stderr=log, text=True,
            start_new_session=True) as program:
        try:
            wait_until(lambda: b"child" in (directory / "out.log").read_bytes(), 20, "its first words")
            yield program
        finally:
            end(trees.Tree((program.pid, process.start_time(program.pid) or 0)), child_of(directory))


def end(tree: trees.Tree, *orphans: int) -> None:
    tree.known.update((pid, process.start_time(pid) or 0) for pid in orphans)
    for one in tree.living():
        process.send(one.identity, signal.SIGKILL)


def child_of(directory: Path) -> int:
    return int((directory / "out.log").read_text().split()[1])


@pytest.mark.parametrize(("words", "state", "reason"), [
    ("step 1/2 loss 0.5\nbye\n", "FAILED", "ended, exit code unknown"),
    ("step 2/2 loss 0.25\n", "COMPLETED", "done"),
    ("Traceback (most recent call last):\n  File x\nValueError: the mouse ran away\n", "FAILED", "error in the program"),
])
def test_an_ending_says_what_is_known(person: Person, tmp_path: Path, words: str, state: str, reason: str) -> None:
    with by_hand(tmp_path / "old") as program:
        job = person.run("adopt", f"local:{program.pid}", "--name", "old").stdout.strip()
        assert person.status("old")["state"] == "RUNNING"
        program.stdin.write(words)
        program.stdin.close()
        program.wait()
        ended = person.until(job, lambda found: found["ended_at"])
        assert (ended["state"], ended["reason"]) == (state, reason)
        assert words.split()[-1] in ended["detail"] or state == "COMPLETED"
        assert person.run("wait", "old", code=int(state != "COMPLETED")).stdout == ""


def test_without_its_supervisor_it_is_still_found_and_ended(person: Person, tmp_path: Path) -> None:
    with by_hand(tmp_path / "old") as program:
        job = person.run("adopt", f"local:{program.pid}").stdout.strip()
        run = RunDir(Path(person.status(job)["run_dir"]))
        beat = process.read_heartbeat(run.attempt(0))
        os.kill(beat["pid"], signal.SIGKILL)
        lost = person.until(job, lambda found: found["ended_at"])
        assert lost["reason"] == "supervisor lost" and lost["detail"].startswith("2 of its processes still run")
        killed = person.run("kill", "--grace", "1s", job)
        assert "freed 2 processes" in killed.stdout
        assert program.wait(5) == -signal.SIGTERM and process.start_time(child_of(tmp_path / "old")) is None


def test_what_cannot_be_adopted(person: Person, tmp_path: Path) -> None:
    assert "no process 99999999" in person.run("adopt", "local:99999999", code=2).stderr
    assert "NODE:PID" in person.run("adopt", "4242", code=2).stderr
    assert "runs this launch" in person.run("adopt", f"local:{os.getpid()}", code=4).stderr
    with by_hand(tmp_path / "old") as program:
        assert "no such file" in person.run("adopt", f"local:{program.pid}", "--log", "nowhere.log", code=2).stderr
        assert "one group" in person.run("adopt", f"local:{program.pid}", "--progress", "step=x", code=2).stderr


@pytest.mark.parametrize(("line", "step", "total", "loss"), [
    (" 14%|#4  | 289/2,000 [00:01<00:03, 9.1it/s, loss=0.003]", "289", "2,000", "0.003"),
    ("Steps:  12%|# | 12/100 [00:01<00:03]", "12", "100", None),
    ("step 12/600  loss 0.5406  psnr 8.4", "12", "600", "0.5406"),
    ("[Step 1200] train_loss: 1.2e-3", "1200", None, "1.2e-3"),
    ("{'loss': nan, 'step': 7}", "7", None, "nan"),
    ("iteration 5 of 10", "5", "10", None),
    ("0.3 s per step 0.5, a lossless 3", None, None, None),
])
def test_the_usual_ways_to_print_progress(line: str, step: str | None, total: str | None, loss: str | None) -> None:
    found = {name: match[1] if (match := re.search(text, line)) else None for name, text in PROGRESS.items()}
    assert found == {"step": step, "total": total, "loss": loss}


def test_a_script_adopts_what_it_started_itself(person: Person) -> None:
    """Not the script, which waits for the answer."""
    script = f"sleep 99 > out.log & {sys.executable} -m launcher.cli adopt local:$! > job; kill $!; wait"
    subprocess.run(["sh", "-c", script], env=person.env, cwd=person.at, check=False, timeout=60)
    job = (person.at / "job").read_text().strip()
    assert job and person.until(job, lambda found: found["ended_at"])["reason"] == "ended, exit code unknown"


def test_secrets_are_told_from_the_rest() -> None:
    env = {"PATH": "/bin", "WANDB_API_KEY": "a", "HF_HOME": "/h", "MYTHING": "hf_abc", "DB_PASSWORD": "b", "TMUX": "x",
           "TOKENIZERS_PARALLELISM": "false", "http_proxy": "http://me:secret@proxy", "SSH_CONNECTION": "1",
           "LAUNCH_TOKEN": "c", "RANK": "0", "CUDA_VISIBLE_DEVICES": "1", "KEYBOARD": "us"}
    own, secrets = separated(env)
    assert set(own) == {"PATH", "HF_HOME", "TOKENIZERS_PARALLELISM", "CUDA_VISIBLE_DEVICES", "KEYBOARD"}
    assert set(secrets) == {"WANDB_API_KEY", "MYTHING", "DB_PASSWORD", "http_proxy"}


def test_a_rank_belongs_to_what_started_it() -> None:
    line = [sys.executable, "-c", "import os, time; os.fork(); os.fork(); time.sleep(99)"]
    with subprocess.Popen(["sh", "-c", '"$@"; :', "sh", *line], start_new_session=True) as shell:
        tree = trees.Tree((shell.pid, process.start_time(shell.pid)))
        try:
            workers = wait_until(lambda: len(found := tree.living()) == 5 and found, 10, "four processes and their shell")
            table = process.process_table()
            assert {trees.root_of(one.pid, table).pid for one in workers} == {shell.pid}
            shell.kill()
            shell.wait()
            assert len(tree.living()) == 4  # orphans now, and not lost from sight
        finally:
            end(tree)
