"""Files come whole or not at all, from where a cut transfer stopped, and nothing of the person's own is overwritten."""
from __future__ import annotations

import json
import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path
from typing import Any

import pytest

from cluster.backends.host import HostBackend
from cluster.contract import write_artifact_manifest
from cluster.errors import Unreachable
from cluster.inventory import local_node
from cluster.node import fetch
from launcher import pull
from launcher.commands.pull import bar
from launcher.errors import Failed, Refused, Wrong
from launcher.index import Job
from tests.launcher.conftest import Person

BIG = os.urandom(1_500_000)
FILES = {"artifacts/samples/0.png": b"png", "artifacts/samples/deep/0.ply": BIG, "artifacts/empty": b"",
         "attempts/000/logs/rank-0.log": b"said\n", "config.yaml": b"a: 1\n", "code/config.yaml": b"b: 1\n",
         "checkpoints/step-00000001-a000/model": b"m", "checkpoints/.tmp-step-2/model": b"half",
         "control/stop": b"{}", ".supervisor.lock": b""}


class Cut(HostBackend):
    """This computer, over a link that breaks after so many frames, and may change what it carries."""

    def __init__(self, *lives: int, change: Callable[[bytes], bytes] = bytes) -> None:
        super().__init__(local_node())
        self.lives, self.change = list(lives), change
        self.asked: list[Any] = []

    def pull(self, run_dir: str, files: Any) -> Iterator[tuple[dict[str, Any], bytes]]:
        self.asked.append(files)
        life = self.lives.pop(0) if self.lives else 10**9
        with closing(super().pull(run_dir, files)) as frames:
            for number, (header, body) in enumerate(frames):
                if number == life:
                    raise Unreachable("connection reset")
                yield header, self.change(body)


@pytest.fixture
def job(tmp_path: Path) -> Job:
    run = tmp_path / "runs" / "phase2-abc"
    for name, content in FILES.items():
        (run / name).parent.mkdir(parents=True, exist_ok=True)
        (run / name).write_bytes(content)
    (run / "artifacts" / "gone").symlink_to("nowhere")
    return Job("t", "phase2-abc", None, "local", str(run), True, 0.0, 0.0, {})


@pytest.fixture
def fetched(job: Job, tmp_path: Path) -> Callable[..., pull.Pulled]:
    def fetch_all(backend: HostBackend, pattern: str | None = None, out: Path | None = None, force: bool = False,
                  told: list[str] | None = None) -> pull.Pulled:
        said = [] if told is None else told
        return pull.pull(backend, job, pattern, out, force, tmp_path, said.append, lambda here, total, path: None)

    return fetch_all


@pytest.mark.parametrize(("pattern", "expected"), [
    ("", {"artifacts/samples/0.png", "artifacts/samples/deep/0.ply", "artifacts/empty"}),
    ("samples", {"artifacts/samples/0.png", "artifacts/samples/deep/0.ply"}),
    ("*.ply", {"artifacts/samples/deep/0.ply"}), ("samples/*.p*", {"artifacts/samples/0.png"}),
    ("./artifacts/**/0.*", {"artifacts/samples/0.png", "artifacts/samples/deep/0.ply"}),
    ("config.yaml", {"config.yaml"}), ("attempts/*/logs/", {"attempts/000/logs/rank-0.log"}),
    ("checkpoints", {"checkpoints/step-00000001-a000/model"}), ("control", set()), ("nothing", set())])
def test_what_a_pattern_means(job: Job, pattern: str, expected: set[str]) -> None:
    listed = fetch.files({"run_dir": job.run_dir, "pattern": pattern}, None)
    assert {path for path, *_ in listed["files"]} == expected


def test_a_cut_transfer_goes_on_where_it_stopped(fetched: Callable[..., pull.Pulled], tmp_path: Path,
                                                 monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "_BACK_OFF_S", (0.0,))
    backend, told = Cut(3, 0, 1), []
    done = fetched(backend, told=told)
    assert {one["path"] for one in done.files} == {name for name in FILES if name.startswith("artifacts/")}
    assert all((tmp_path / "phase2-abc" / name).read_bytes() == FILES[name] for name in FILES if "artifacts" in name)
    assert len(backend.asked) == 4 and len(told) == 2
    assert done.fetched_bytes == done.bytes == len(BIG) + 3  # no byte travelled twice
    assert done.left_out == ["artifacts/gone: No such file or directory"]
    assert not list((tmp_path / "phase2-abc").rglob(".*.part"))


def test_a_command_that_was_stopped_is_gone_on_with(fetched: Callable[..., pull.Pulled], job: Job) -> None:
    class Stopped(Exception):
        pass

    def stop(body: bytes) -> bytes:
        if len(body) == fetch.BLOCK:
            stop.seen += 1
        if stop.seen == 3:
            raise Stopped
        return body

    stop.seen = 0
    with pytest.raises(Stopped):
        fetched(Cut(change=stop))
    done = fetched(Cut())
    assert done.already == 2 and done.fetched_bytes == len(BIG) - 2 * fetch.BLOCK and not done.problems


def test_what_arrives_changed_is_fetched_again_and_never_counts(
        fetched: Callable[..., pull.Pulled], tmp_path: Path, job: Job) -> None:
    flips = [b"x" * fetch.BLOCK]

    def once(body: bytes) -> bytes:
        return flips.pop() if flips and len(body) == fetch.BLOCK else body

    assert not fetched(Cut(change=once), "*.ply").problems
    done = fetched(Cut(change=lambda body: body.replace(b"png", b"PNG")))
    assert list(done.problems) == ["artifacts/samples/0.png"] and "twice" in done.problems["artifacts/samples/0.png"]
    assert not (tmp_path / "phase2-abc/artifacts/samples/0.png").exists()


def test_what_its_manifest_does_not_know_is_said(fetched: Callable[..., pull.Pulled], job: Job) -> None:
    samples = Path(job.run_dir) / "artifacts" / "samples"
    write_artifact_manifest(samples, job.id, 0)
    (samples / "0.png").write_bytes(b"gnp")
    problems = fetched(Cut(), "samples").problems
    assert list(problems) == ["artifacts/samples/0.png"] and "manifest" in problems["artifacts/samples/0.png"]


def test_files_of_ones_own_are_left_alone(fetched: Callable[..., pull.Pulled], tmp_path: Path) -> None:
    own = tmp_path / "mine"
    own.mkdir()
    (own / "config.yaml").write_bytes(b"c: 9\n")
    done = fetched(Cut(), "config.yaml", own)
    assert done.differing == ["config.yaml"] and (own / "config.yaml").read_bytes() == b"c: 9\n"
    (own / "config.yaml").write_bytes(b"longer: 9\n")
    with pytest.raises(Refused, match="1 file of another size") as error:
        fetched(Cut(), "config.yaml", own)
    assert error.value.exit_code == 4 and "--force" in str(error.value)
    assert not fetched(Cut(), "config.yaml", own, force=True).problems
    assert (own / "config.yaml").read_bytes() == b"a: 1\n"


def test_nothing_that_fits_is_said_with_what_there_is(fetched: Callable[..., pull.Pulled], job: Job) -> None:
    with pytest.raises(Wrong) as error:
        fetched(Cut(), "sampels")
    assert str(error.value).startswith("phase2-abc: no file fits 'sampels'\n  nearest: samples; it has: "
                                       "artifacts/empty (1 file, 0 B), artifacts/samples (2 files, 1.5 MB)")
    for name in [name for name in FILES if name.startswith("artifacts")]:
        (Path(job.run_dir) / name).unlink()
    with pytest.raises(Failed, match="it has left no artifacts"):
        fetched(Cut())


def test_a_link_that_stays_away_is_given_up(
        fetched: Callable[..., pull.Pulled], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(pull, "_BACK_OFF_S", (0.0,))
    monkeypatch.setattr(pull, "_GIVE_UP_S", 0.0)
    with pytest.raises(Unreachable, match="does not come back") as error:
        fetched(Cut(*[0] * 99))
    assert "the same command goes on" in str(error.value)


def test_the_bar_says_how_much_how_fast_and_how_long() -> None:
    assert bar(312_000_000, 500_000_000, 11_200_000.0, "artifacts/a\n") == (
        " 62 %  312 MB of 500 MB  11.2 MB/s  16 s left  artifacts/a\\n")
    assert bar(0, 0, None, "x").startswith("100 %")


def test_the_verb(person: Person) -> None:
    makes = 'mkdir -p "$LAUNCH_RUN_DIR/artifacts/맵 s"; echo hello > "$LAUNCH_RUN_DIR/artifacts/맵 s/a b"'
    job = person.submit("--", "sh", "-c", makes)
    person.run("wait", job)
    done = person.run("pull", job)
    assert done.stdout == f"{job}: 1 file, 6 B in {job}; sha256 verified\n" and done.stderr == ""
    assert (person.at / job / "artifacts" / "맵 s" / "a b").read_text() == "hello\n"
    told = json.loads(person.run("pull", "@last", "a b", "-o", "out", "--json").stdout)
    assert told["files"][0]["path"] == "artifacts/맵 s/a b" and told["fetched_bytes"] == 6
    assert "1 of them were here already" in person.run("pull", job).stdout
    (person.at / "out" / "artifacts" / "맵 s" / "a b").write_text("other\n")
    assert "--force" in person.run("pull", job, "-o", "out", code=4).stderr
    assert "no file fits 'x'" in person.run("pull", job, "x", code=2).stderr
