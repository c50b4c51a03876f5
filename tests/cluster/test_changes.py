"""A follower is told of changes, so that it need not look."""
from __future__ import annotations

import select
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.node.changes import Changes


@pytest.fixture
def changes(tmp_path: Path) -> Iterator[Changes]:
    one = Changes()
    assert one.descriptor is not None, "no inotify instance: raise fs.inotify.max_user_instances"
    one.watch(tmp_path)
    yield one
    one.close()


def told(changes: Changes, within_s: float = 2.0) -> bool:
    return bool(select.select([changes.descriptor], [], [], within_s)[0])


def test_a_new_file_an_added_line_and_a_replacement_are_told(changes: Changes, tmp_path: Path) -> None:
    log, aside = tmp_path / "rank-0.log", tmp_path.parent / f"{tmp_path.name}.aside"
    for change in (lambda: log.touch(), lambda: log.write_bytes(b"a line\n"),
                   lambda: aside.touch() or aside.replace(log)):
        change()
        assert told(changes)
        changes.forget()
        assert not told(changes, 0)


def test_a_directory_that_is_not_there_yet_is_taken_up_later(changes: Changes, tmp_path: Path) -> None:
    logs = tmp_path / "logs"
    changes.watch(logs)
    logs.mkdir()
    changes.watch(logs)
    changes.forget()
    (logs / "rank-0.log").write_bytes(b"a line\n")
    assert told(changes)
