"""What is copied of a work tree, and under which name."""
from __future__ import annotations

import os
import subprocess
import tarfile
from pathlib import Path

import pytest

from launcher import snapshot
from launcher.errors import TooBig, Wrong
from launcher.patterns import ignored, read_patterns


def git(root: Path, *args: str) -> str:
    done = subprocess.run(["git", "-C", str(root), *args], check=True, capture_output=True, text=True)
    return done.stdout.strip()


@pytest.fixture
def tree(tmp_path: Path) -> Path:
    root = tmp_path / "얼굴 it's; $HOME"
    (root / "sub").mkdir(parents=True)
    (root / "train.py").write_text("print(1)\n")
    (root / "sub" / "util.py").write_text("x = 1\n")
    (root / "gone.py").write_text("")
    (root / ".gitignore").write_text("data/\n*.ckpt\n")
    (root / "run.sh").write_text("#!/bin/sh\n")
    (root / "run.sh").chmod(0o755)
    git(tmp_path, "init", "-q", str(root))
    git(root, "add", "-A")
    git(root, "commit", "-qm", "first")
    return root


def names(taken: snapshot.Snapshot) -> set[str]:
    return {file.path for file in taken.files}


def unpacked(taken: snapshot.Snapshot) -> dict[str, bytes]:
    with taken.pack() as packed, tarfile.open(fileobj=packed) as tar:
        return {entry.name: tar.extractfile(entry).read() for entry in tar if entry.isfile()}


def test_tracked_and_new_files_as_they_lie_there_without_ignored_ones(tree: Path) -> None:
    (tree / "train.py").write_text("print(2)\n")
    (tree / "새 파일.py").write_text("y = 2\n")
    (tree / "gone.py").unlink()
    (tree / "data").mkdir()
    (tree / "data" / "big.bin").write_bytes(b"0" * 1000)
    taken = snapshot.take(tree)
    assert names(taken) == {".gitignore", "run.sh", "sub/util.py", "train.py", "새 파일.py"}
    assert taken.code.git_sha == git(tree, "rev-parse", "HEAD")
    assert taken.code.dirty and taken.code.untracked == ("새 파일.py",)
    content = unpacked(taken)
    assert content["train.py"] == b"print(2)\n"
    assert b"+print(2)" in content[snapshot.PATCH]


def test_the_same_content_is_the_same_name_and_the_same_bytes(tree: Path, tmp_path: Path) -> None:
    first = snapshot.take(tree)
    copy = tmp_path / "copy"
    git(tmp_path, "clone", "-q", str(tree), str(copy))
    for path in copy.rglob("*"):
        if path.is_file() and ".git" not in path.parts:
            os.utime(path, (1, 1))
    second = snapshot.take(copy)
    assert first.code.digest == second.code.digest
    with first.pack() as one, second.pack() as other:
        assert one.read() == other.read()
    (copy / "train.py").write_text("print(3)\n")
    assert snapshot.take(copy).code.digest != first.code.digest


def test_launchignore_leaves_out_and_launchinclude_brings_back(tree: Path) -> None:
    (tree / "weights").mkdir()
    (tree / "weights" / "small.ckpt").write_bytes(b"w")
    (tree / "weights" / "large.ckpt").write_bytes(b"W")
    (tree / ".launchignore").write_text("# not needed\nsub/\n!sub/util.py\n*.sh\n")
    (tree / ".launchinclude").write_text("weights/small.ckpt\n")
    assert names(snapshot.take(tree)) == {".gitignore", ".launchignore", ".launchinclude", "gone.py",
                                          "sub/util.py", "train.py", "weights/small.ckpt"}


def test_an_include_that_matches_nothing_is_said(tree: Path) -> None:
    (tree / ".launchinclude").write_text("wieghts/*.ckpt\n")
    with pytest.raises(Wrong, match="matches no file"):
        snapshot.take(tree)


def test_too_large_names_the_largest_files_and_the_remedy(
    tree: Path, monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("LAUNCH_CODE_LIMIT_MB", "1")
    (tree / "features.npy").write_bytes(b"0" * 1_500_000)
    with pytest.raises(TooBig) as error:
        snapshot.take(tree)
    said = str(error.value)
    assert "the limit is 1 MB" in said and "1.5 MB  features.npy" in said and ".launchignore" in said


def test_without_git_every_file_counts(tmp_path: Path) -> None:
    (tmp_path / "a").mkdir()
    (tmp_path / "a" / "x.py").write_text("")
    (tmp_path / "a" / "link").symlink_to("x.py")
    (tmp_path / "a" / "__pycache__").mkdir()
    (tmp_path / "a" / "__pycache__" / "x.pyc").write_text("")
    taken = snapshot.take(tmp_path)
    assert names(taken) == {"a/x.py", "a/link"}
    assert taken.code.git_sha is None and not taken.code.dirty
    with taken.pack() as packed, tarfile.open(fileobj=packed) as tar:
        assert tar.getmember("a/link").linkname == "x.py"


def test_a_part_of_a_work_tree_is_named_from_there(tree: Path) -> None:
    (tree / "sub" / "new.py").write_text("")
    taken = snapshot.take(tree / "sub")
    assert names(taken) == {"util.py", "new.py"} and taken.code.untracked == ("new.py",)


def test_a_repository_without_a_commit_works(tmp_path: Path) -> None:
    git(tmp_path, "init", "-q", ".")
    (tmp_path / "x.py").write_text("")
    git(tmp_path, "add", "x.py")
    assert names(snapshot.take(tmp_path)) == {"x.py"}


def test_a_work_tree_inside_is_taken_whole(tree: Path) -> None:
    inner = tree / "lib"
    git(tree, "init", "-q", str(inner))
    (inner / "deep").mkdir()
    (inner / "deep" / "y.py").write_text("")
    assert "lib/deep/y.py" in names(snapshot.take(tree))


def test_an_edit_while_packing_is_noticed(tree: Path) -> None:
    taken = snapshot.take(tree)
    (tree / "train.py").write_text("print(4)\n")
    with pytest.raises(snapshot.Changed, match="train.py"):
        taken.pack()


def test_a_log_that_grows_while_packing_is_packed_as_it_was(tree: Path) -> None:
    log = tree / "nohup.out"
    log.write_text("step 1\n")
    taken = snapshot.take(tree)
    with log.open("a") as file:
        file.write("step 2\n")
    with taken.pack() as archive, tarfile.open(fileobj=archive) as tar:
        packed = tar.extractfile("nohup.out")
        assert packed and packed.read() == b"step 1\n"


@pytest.mark.parametrize(("pattern", "matching", "other"), [
    ("*.pt", ["a.pt", "b/c.pt"], ["a.pth"]),
    ("/data", ["data/x", "data"], ["a/data/x"]),
    ("data/", ["data/x", "a/data/x"], ["data"]),
    ("a/*/c", ["a/b/c", "a/b/c/d"], ["a/b/b/c"]),
    ("a/**/c", ["a/c", "a/b/b/c"], ["b/a/c"]),
    ("x[0-9].py", ["x1.py"], ["xa.py"]),
    ("log?", ["log1"], ["log12"]),
    ("wild/**", ["wild/a/b"], ["wild"]),
])
def test_patterns_mean_what_they_mean_to_git(pattern: str, matching: list[str], other: list[str]) -> None:
    patterns = read_patterns(pattern)
    assert all(ignored(path, patterns) for path in matching)
    assert not any(ignored(path, patterns) for path in other)
