"""`launch compare`: what differs between jobs, and the table of what they learned."""
from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from launcher.compare import Compared, Comparison, differences, learned
from launcher.compare_views import as_object, as_text, sparkline
from launcher.views import width
from tests.launcher.conftest import Person
from tests.launcher.test_views import JOB

LINES = [
    {"t": 1, "step": 0, "event": "eval", "val/psnr": 9.0, "val/psnr_input": 9.5, "val/ssim": 0.1},
    *({"t": 2, "step": n, "loss": 1 / n, "psnr": float(n), "lr": n * 1e-6, "applied": n - (n > 3), "it_s": 2.0}
      for n in range(1, 5)),
    {"t": 3, "step": 4, "event": "skipped", "reason": "exploded"},
    {"t": 3, "step": 5, "loss": "nan", "psnr": "nan", "lr": 5e-6, "applied": 4, "it_s": 4.0},
    {"t": 4, "step": 5, "event": "eval", "val/psnr": 21.5, "val/psnr_input": 23.5, "val/ssim": 0.8,
     "val/psnr_white": 13.3, "val/psnr_mean": 20.9},
]


def test_a_jobs_numbers_are_those_of_its_last_steps_and_evaluation() -> None:
    found = learned(LINES)
    assert (found.step, found.psnr, found.val_psnr, found.val_psnr_input) == (5, 2.5, 21.5, 23.5)
    assert (found.applied, found.attempted, found.skipped, found.lr, found.s_step) == (4, 5, 1, 5e-6, 0.25)
    assert (found.val_psnr_best, found.val_psnr_white, found.val_lpips, found.curve) == (21.5, 13.3, None, (9.0, 21.5))
    assert found.loss == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)  # the step that was not finite is none


def test_a_job_that_said_nothing_has_no_numbers() -> None:
    assert learned([]) == learned([{"t": 1, "step": 0, "event": "resumed"}]).__class__()


def test_only_keys_whose_values_differ_are_shown_and_a_missing_one_is_no_null() -> None:
    first = {"a": {"b": 1, "c": None}, "same": [1, 2]}
    found = differences([first, {"a": {"b": 2}, "same": [1, 2]}, first])
    assert set(found) == {"a.b", "a.c"}
    assert (found["a.b"], repr(found["a.c"])) == ((1, 2, 1), "(None, (absent), None)")
    assert differences([first]) == differences([first, first]) == {}


def compared(*names: str) -> Comparison:
    configs = [{"training": {"lr": 10.0 ** -n, "note": None}, "seed": 0} for n in range(len(names))]
    jobs = tuple(Compared(replace(JOB, id=f"phase3-{n}", name=name), configs[n], "abc", learned(LINES if n else []))
                 for n, name in enumerate(names))
    return Comparison(jobs, differences(configs))


def test_the_tables_have_a_row_for_each_job_and_no_empty_column() -> None:
    config, results = as_text(compared("생쥐", "mouse")).split("\n\n")
    assert config.splitlines() == ["job       training.lr", "phase3-0  1", "phase3-1  0.1"]
    titles, first, second = results.splitlines()
    assert titles.split() == ["job", "name", "state", "step", "psnr", "val", "psnr", "best", "inputs", "val", "ssim",
                              "white", "mean", "applied", "skipped", "lr", "s/step", "loss", "curve"]
    assert first.split() == ["phase3-0", "생쥐", "RUNNING"]
    assert second.split()[3:] == ["5", "2.50", "21.50", "21.50", "23.50", "0.800", "13.30", "20.90", "4/5", "1", "5e-06",
                                  "0.25", "0.5208", "▁█"]
    assert width(first[:first.index("RUNNING")]) == width(second[:second.index("RUNNING")])


def test_few_jobs_with_many_keys_have_a_row_for_each_key() -> None:
    found = compared("a", "b")
    found = replace(found, config={**found.config, "training.note": (None, "x" * 99), "seed": (True, [1])})
    lines = as_text(found).split("\n\n")[0].splitlines()
    assert lines[0].split() == ["key", "phase3-0", "phase3-1"]
    assert lines[2].split()[:2] == ["training.note", "null"] and lines[2].endswith("x…")
    assert lines[3].split() == ["seed", "true", "[1]"]


def test_equal_configs_and_other_code_are_told() -> None:
    found = compared("a", "b")
    same = replace(found, config={})
    assert as_text(same).startswith("the configs are the same\n\n")
    other = replace(same, jobs=(same.jobs[0], replace(same.jobs[1], code="def")))
    assert as_text(other).startswith("job       (code)\nphase3-0  abc\nphase3-1  def\n")


def test_the_course_of_a_number() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([3.0]) == "" and sparkline([1, 1]) == "▁▁" and len(sparkline(range(1000))) == 16


def test_the_object_leaves_out_what_a_job_does_not_have() -> None:
    found = as_object(compared("a", "b"))
    assert found["config"] == {"training.lr": {"phase3-0": 1.0, "phase3-1": 0.1}}
    assert found["jobs"][1]["skipped"] == 1 and found["jobs"][0]["psnr"] is None


def test_jobs_and_the_points_of_a_sweep_by_its_name(person: Person) -> None:
    person.run("submit", "tick", "--sweep", "steps=1,2", "--name", "length")
    person.run("wait", "length")
    for n, job in enumerate(json.loads(person.run("status", "length", "--json").stdout)):
        metrics = Path(job["run_dir"]) / "attempts/000/metrics.jsonl"
        metrics.write_text("".join(json.dumps(line) + "\n" for line in (LINES if n else LINES[:3])))
    config, results = person.run("compare", "length").stdout.split("\n\n")
    assert [line.split()[1:] for line in config.splitlines()] == [["steps"], ["1"], ["2"]]
    rows = [line.split() for line in results.splitlines()]
    assert [row[1:4] for row in rows[1:]] == [["steps=1", "COMPLETED", "2"], ["steps=2", "COMPLETED", "5"]]
    first, second = json.loads(person.run("compare", "length", "--json").stdout)["jobs"]
    assert (first["point"], second["point"]) == ({"steps": "1"}, {"steps": "2"})
    assert (first["attempted"], second["attempted"], second["skipped"]) == (2, 5, 1)
    other = person.submit("tick", "--config", "failing")
    person.run("wait", other, code=1)
    assert "fail" in person.run("compare", first["id"], other).stdout
    assert "no such job" in person.run("compare", "nobody", code=2).stderr
