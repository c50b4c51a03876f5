"""The Tab key, in the shells themselves; and that asking it loads nothing heavy."""
from __future__ import annotations

import fcntl
import os
import pty
import select
import shlex
import shutil
import subprocess
import sys
import termios
import time
from collections.abc import Sequence
from pathlib import Path

import pytest

from launcher.completion import SCRIPTS, candidates, typed
from launcher.index import Job, open_index
from tests.test_architecture import HEAVY

CLUSTER = """
ssh_config: x  # nodes: none
nodes:
  # the big ones
  gpu05: {via: ssh, host: gpu05}
  'gpu06':
    via: ssh
    env: {conda: mouse}
other: 1
"""
SHELLS = {"bash": ["bash", "--norc", "--noprofile", "-i"], "zsh": ["zsh", "-f", "-i"], "fish": ["fish", "--no-config", "-i"]}
SET_UP = {"bash": "PS1='> '; source {script}", "zsh": "PS1='> '; autoload -U compinit; compinit -D -u; source {script}",
          "fish": "function fish_prompt; echo '> '; end; source {script}"}


@pytest.fixture
def project(tmp_path: Path, own_world: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """With stages, run files, nodes and an index."""
    there = tmp_path / "project"
    for name in ("stages/mine.yaml", "runs/mine/small.yaml", "runs/mine/large.yaml"):
        (there / "configs" / name).parent.mkdir(parents=True, exist_ok=True)
        (there / "configs" / name).write_text("")
    (there / "configs" / "cluster.yaml").write_text(CLUSTER)
    with open_index() as index:
        for number, (name, ended) in enumerate([("mouse's 쥐", False), (None, False), ("lr=1e-5", True)]):
            index.put(Job(f"t{number}", f"mine-00000{number}", name, "local", f"/w/{number}", ended, number, 0.0, {}))
    monkeypatch.chdir(there)
    return there


@pytest.mark.parametrize(("line", "expected"), [
    ("sta", ["status"]), ("submit mi", ["mine"]), ("submit --node gpu", ["gpu05", "gpu06"]),
    ("submit --node=gpu06", ["--node=gpu06"]), ("submit mine --config ", ["large", "small"]),
    ("submit --gpus 2 mi", ["mine"]), ("kill l", []), ("status l", ["lr=1e-5"]), ("wait m", [
        "mine-000001", "mouse's 쥐", "mine-000000", "mine-000002"]), ("logs --attempt ", ["all"]),
    ("submit --resume never", ["never"]), ("logs --fol", ["--follow"]), ("logs x ", []), ("kill x @", ["@last"]),
    ("completion f", ["fish"]), ("nonsense ", []), ("submit --after @", ["@last"])])
def test_what_can_stand_there(project: Path, line: str, expected: list[str]) -> None:
    assert candidates(line.split(" "), project) == expected


@pytest.mark.parametrize("line", ["submit -- ls ", "submit --cwd ", "pull x -o ", "submit --resume /data"])
def test_where_a_file_stands_the_shell_goes_on(project: Path, line: str) -> None:
    assert candidates(line.split(" "), project) is None


def test_without_an_index_or_a_cluster_there_is_still_an_answer(tmp_path: Path) -> None:
    assert candidates(["kill", ""], tmp_path) == []
    assert candidates(["submit", "--node", ""], tmp_path) == ["local", "any"]
    assert "phase3" in (candidates(["submit", ""], tmp_path) or [])
    assert not (Path(os.environ["LAUNCH_HOME"])).exists()


def test_the_words_that_bash_cuts_are_put_together() -> None:
    assert typed(["submit", "--node", "=", "gp"], split=True) == (["submit", "--node=gp"], "--node=")
    assert typed(["submit", "--node", "="], split=True) == (["submit", "--node="], "--node=")
    assert typed(["kill", "'my jo"], split=True) == (["kill", "my jo"], "")
    assert typed(["kill", r"mouse\'s"], split=False) == (["kill", "mouse's"], "")


def test_asking_loads_only_the_standard_library(project: Path) -> None:
    code = "import sys; from launcher.cli import main\nmain()\nprint(*sys.modules, file=sys.stderr)"
    asked = [sys.executable, "-c", code, "completion", "--words", "bash", "submit", "--node", ""]
    done = subprocess.run(asked, capture_output=True, text=True, check=True)
    assert done.stdout == "local\ngpu05\ngpu06\nany\n"
    assert {name.split(".")[0] for name in done.stderr.split()} & HEAVY == set()


@pytest.mark.parametrize("shell", [shell for shell in SCRIPTS if shutil.which(shell)])
def test_the_tab_key(project: Path, tmp_path: Path, shell: str) -> None:
    """What was typed, with Tab, is what `echo` gets."""
    program = tmp_path / "bin" / "launch"
    program.parent.mkdir()
    program.write_text(f"#!/bin/sh\nexec {shlex.quote(sys.executable)} -m launcher.cli \"$@\"\n")
    program.chmod(0o755)
    script = tmp_path / "script"
    script.write_text(SCRIPTS[shell])
    with Terminal(SHELLS[shell], program.parent) as terminal:
        terminal.enter(SET_UP[shell].format(script=shlex.quote(str(script))))
        for line, expected in (("launch kill mou", "launch kill mouse's 쥐"), ("launch submit --node gpu06", "gpu06"),
                               ("launch submit --node=gpu06", "--node=gpu06"), ("launch compl", "launch completion")):
            assert expected in terminal.completed(line)


class Terminal:
    """A shell that believes that a person types."""

    def __init__(self, argv: Sequence[str], path: Path) -> None:
        self._own, theirs = pty.openpty()
        termios.tcsetwinsize(theirs, (40, 200))
        root = Path(__file__).parents[2]
        env = {**os.environ, "PATH": f"{path}:{os.environ['PATH']}", "PYTHONPATH": str(root), "TERM": "dumb",
               "LC_ALL": "C.UTF-8"}
        self._shell = subprocess.Popen(argv, stdin=theirs, stdout=theirs, stderr=theirs, env=env,
                                       start_new_session=True,
                                       preexec_fn=lambda: fcntl.ioctl(0, termios.TIOCSCTTY, 0))
        os.close(theirs)
        self._number = 0

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_exc: object) -> None:
        self._shell.kill()
        self._shell.wait()
        os.close(self._own)

    def enter(self, line: str) -> None:
        """Run a line, and wait until it has."""
        self._number += 1
        os.write(self._own, f"{line}; echo do''ne{self._number}\r".encode())
        self._until(f"done{self._number}")

    def completed(self, line: str) -> str:
        """Type a line and Tab, then `echo` before it; what that prints."""
        self._number += 1
        os.write(self._own, f"{line}\t".encode())
        os.write(self._own, b"\x05 end" + str(self._number).encode() + b"\x01echo be''gin\r")  # not as it is typed
        return self._until(f" end{self._number}\r\n", after="begin")

    def _until(self, text: str, after: str = "") -> str:
        """What is shown up to `text`, once that was printed (not typed) behind `after`."""
        shown, deadline = "", time.monotonic() + 60
        while not (after in shown and text in shown.rpartition(after)[2] if after else text in shown):
            left = deadline - time.monotonic()
            assert left > 0 and select.select([self._own], [], [], left)[0], shown
            shown += os.read(self._own, 4096).decode(errors="replace")
        return shown.rpartition(after)[2] if after else shown
