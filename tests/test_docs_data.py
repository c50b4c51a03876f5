"""The commands of docs/data.md and docs/clap.md are run as they stand there and say what stands below them."""
from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from tests.jobs.test_data_check import tool
from tests.test_docs import blocks


def examples(document: str = "docs/data.md") -> list[tuple[str, str]]:
    """(command, output) of each block."""
    found = []
    for block in blocks(document, "console"):
        command, _, output = block.partition("\n")
        assert command.startswith("$ python -m jobs.data ")
        found.append((command.removeprefix("$ python -m jobs.data "), output))
    return found


def without_times(text: str) -> str:
    return re.sub(r"[\d.e-]+ s a (sample|pair)", r"T s a \1", text)


def test_the_commands_of_the_document(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert {command.split()[0] for command, _ in examples()} == {"toy", "check", "normalize", "center", "split"}
    for command, output in examples():
        done = tool(*shlex.split(command))
        assert done.returncode == 0, (command, done.stderr)
        assert without_times(done.stdout) == without_times(output), command
    assert (tmp_path / "toy.png").is_file()


def test_the_commands_of_the_clap_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert [command.split()[0] for command, _ in examples("docs/clap.md")] == ["sounds", "media"]
    for command, output in examples("docs/clap.md"):
        done = tool(*shlex.split(command))
        assert (done.returncode, without_times(done.stdout)) == (0, without_times(output)), done.stderr
