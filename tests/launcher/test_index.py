"""The index is a cache: quick at any size, safe to share, harmless to lose."""
from __future__ import annotations

import sqlite3
import threading
from pathlib import Path

import pytest

from launcher.errors import Failed, Wrong
from launcher.index import Index, Intent, Job, open_index
from launcher.jobs import find


def job(number: int, ended: bool = True, name: str | None = None) -> Job:
    job_id = f"phase3-{number:06d}"
    view = {"id": job_id, "run_dir": f"/w/runs/{job_id}", "token": f"t{number}", "stage": "phase3",
            "state": "COMPLETED" if ended else "RUNNING"}
    return Job(f"t{number}", job_id, name, "gpu05", view["run_dir"], ended, float(number), 0.0, view)


@pytest.fixture
def index(tmp_path: Path):
    with open_index(tmp_path / "index.sqlite") as opened:
        yield opened


def plan_of(index: Index, question: str) -> str:
    return "; ".join(row[3] for row in index._db.execute(f"EXPLAIN QUERY PLAN {question}"))


def test_a_hundred_thousand_ended_jobs_are_not_read_for_a_status(index: Index) -> None:
    index.put_all([job(number) for number in range(100_000)] + [job(100_001, ended=False)])
    steps = 0

    def count() -> None:
        nonlocal steps
        steps += 1

    index._db.set_progress_handler(count, 100)
    assert [found.id for found in index.active()] == ["phase3-100001"]
    assert index.any_ended() and find(index, "@last").id == "phase3-100001"
    assert find(index, "phase3-050000").id == "phase3-050000"
    assert steps < 50  # thousands of rows would be thousands of steps


def test_the_questions_of_status_use_an_index(index: Index) -> None:
    assert "jobs_active" in plan_of(index, "SELECT * FROM jobs WHERE ended = 0 ORDER BY submitted_at")
    assert "jobs_by_id" in plan_of(index, "SELECT * FROM jobs WHERE id >= 'a' AND id < 'b' ORDER BY id")


def test_a_damaged_file_is_moved_aside_and_begun_anew(
    tmp_path: Path, capsys: pytest.CaptureFixture[str],
) -> None:
    path = tmp_path / "index.sqlite"
    path.write_bytes(b"this is no database" * 100)
    with open_index(path) as index:
        index.put(job(1))
    said = capsys.readouterr().err
    assert "damaged" in said and "launch status asks every node" in said and len(said.splitlines()) == 1
    assert len(list(tmp_path.glob("index.sqlite.damaged-*"))) == 1
    with open_index(path) as index:
        assert [found.id for found in index.all()] == ["phase3-000001"]


def test_what_can_be_read_of_a_damaged_file_is_kept(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    with open_index(path) as index:
        index.put_all([job(number) for number in range(2000)])
        index.add_intent(Intent("t", "phase3-1", None, "gpu05", "~/launch", 1, 0.0))
    content = bytearray(path.read_bytes())
    half = len(content) // 2
    content[half:half + 40960] = b"\xff" * 40960
    path.write_bytes(content)
    with pytest.raises(Failed, match="damaged") as error, open_index(path) as index:
        index.all()
    assert "jobs could be read" in str(error.value) and "again" in str(error.value)
    with open_index(path) as index:
        assert 100 < len(index.all()) < 2000 and len(index.intents()) == 1 and index.incomplete
        index.complete()
        assert not index.incomplete


def test_two_clients_at_once_only_wait_for_each_other(tmp_path: Path) -> None:
    path = tmp_path / "index.sqlite"
    errors: list[BaseException] = []

    def write(first: int) -> None:
        try:
            for number in range(first, first + 30):
                with open_index(path) as index:
                    index.put(job(number))
        except (Failed, sqlite3.Error) as error:
            errors.append(error)

    threads = [threading.Thread(target=write, args=(first,)) for first in (0, 1000)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    with open_index(path) as index:
        assert not errors and len(index.all()) == 60


def test_a_directory_that_cannot_be_made_is_a_clear_message(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(Failed) as error, open_index(tmp_path / "file" / "index.sqlite"):
        pass
    assert "LAUNCH_HOME" in str(error.value)


def test_an_answered_submit_leaves_no_intent(index: Index) -> None:
    index.add_intent(Intent("t7", "phase3-000007", None, "gpu05", "~/launch", 1, 0.0))
    index.started(job(7, ended=False))
    assert index.intents() == [] and [found.id for found in index.active()] == ["phase3-000007"]


def test_a_job_is_found_by_id_prefix_name_and_last(index: Index) -> None:
    index.put_all([job(1), job(2, name="mouse"), job(30, ended=False, name="mouse"), job(31)])
    assert find(index, "phase3-000001").id == "phase3-000001"
    assert find(index, "phase3-000002").name == "mouse"
    assert find(index, "mouse").id == "phase3-000030"  # the one that has not ended
    assert find(index, "@last").id == "phase3-000031"
    with pytest.raises(Wrong) as error:
        find(index, "phase3-00003")
    assert "phase3-000030 on gpu05 (mouse)" in str(error.value) and "phase3-000031" in str(error.value)
    with pytest.raises(Wrong) as error:
        find(index, "phase3-00000x")
    assert "nearest: phase3-0000" in str(error.value)


def test_the_name_of_an_ended_job_is_still_known(index: Index) -> None:
    index.put_all([job(1, name="mouse"), job(2, name="mouse")])
    assert find(index, "mouse").id == "phase3-000002"


def test_a_name_goes_before_the_ids_that_begin_with_it(index: Index) -> None:
    index.put_all([job(1, name="phase3-0000"), job(2, name="phase3-00000"), job(3, name="phase3-00000")])
    assert find(index, "phase3-0000").id == "phase3-000001"
    assert find(index, "phase3-00000").id == "phase3-000003"
    index.put(job(4, ended=False, name="phase3-0000"))
    assert find(index, "phase3-0000").id == "phase3-000004"


def test_a_rescan_forgets_what_is_gone(index: Index) -> None:
    index.put_all([job(1), job(2)])
    index.replace_nodes(["gpu05"], [job(2)])
    assert [found.id for found in index.all()] == ["phase3-000002"]
