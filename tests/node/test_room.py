"""What is left for a user: what the file system has, and a quota where `quota` tells of one."""
from __future__ import annotations

import os
from pathlib import Path

import pytest

from cluster.errors import Refused
from cluster.node import room, submit

# what `quota --user --no-wrap --raw-grace` of Linux quota-tools 4.06 prints
QUOTA = """Disk quotas for user alice (uid 2001):
     Filesystem  blocks   quota   limit   grace   files   quota   limit   grace
      /dev/sda1 9800000* 9000000 10000000 1790000000    1200       0       0       0
   nas:/export/home  500000 1000000       0       0   95000  100000  100000       0
"""


@pytest.fixture
def quota(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The program, as an executable that prints what is in the file `said`."""
    program = tmp_path / "bin" / "quota"
    program.parent.mkdir()
    program.write_text('#!/bin/sh\ncat "$0.said"\nexit 1\n')  # as it ends when a quota is exceeded
    program.chmod(0o755)
    program.with_name("quota.said").write_text(QUOTA)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    return program


@pytest.mark.parametrize(("source", "left", "inodes"), [
    ("/dev/sda1", 200_000 * 1024, None), ("nas:/export/home", 500_000 * 1024, 5000)])
def test_a_quota_counts(quota: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, source: str, left: int,
                        inodes: int | None) -> None:
    monkeypatch.setattr(room, "_source", lambda directory: source)
    found, free = room.of(tmp_path), os.statvfs(tmp_path)
    assert found.bytes == min(left, free.f_bavail * free.f_frsize) and found.quota
    assert inodes is None or found.inodes == inodes
    with pytest.raises(Refused, match="MB free of your quota there") as error:
        room.check(found, tmp_path, 1_000_000_000, 10)
    assert "--force" in str(error.value) and error.value.exit_code == 4


def test_without_a_quota_it_is_the_file_system(quota: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    expected = os.statvfs(tmp_path).f_bavail * os.statvfs(tmp_path).f_frsize
    monkeypatch.setattr(room, "QUOTA_S", 0.2)
    for said in ("Disk quotas for user alice (uid 2001): none\n", QUOTA):
        quota.with_name("quota.said").write_text(said)
        found = room.of(tmp_path)
        assert not found.quota and abs(found.bytes - expected) < 1_000_000_000
    quota.write_text("#!/bin/sh\nexec sleep 60\n")
    assert not room.of(tmp_path).quota


def test_the_mount_of_a_directory_is_found(tmp_path: Path) -> None:
    assert room._source(Path("/proc/self")) == "proc"
    assert room._source(tmp_path)


def test_a_supervisor_that_could_not_write_its_last_words(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    errors = tmp_path / "supervisor.err"
    errors.write_text("what an earlier one said\n")
    assert submit.last_words(errors) == "what an earlier one said"
    full = os.statvfs_result([4096, 4096, 100, 0, 0, 100, 90, 90, 0, 255])
    monkeypatch.setattr(os, "statvfs", lambda path: full)
    assert f"no space left on {tmp_path}" in submit.last_words(errors)
