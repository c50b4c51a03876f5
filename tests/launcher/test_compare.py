"""`launch compare`: what differs between jobs, and the table of what they learned and took."""
from __future__ import annotations

import json
import subprocess
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.node import worktree
from cluster.node.comparing import Span, reached
from launcher import compare_facts, past_configs
from launcher.commands import compare, report
from launcher.compare import Compared, Comparison, Goal, Spent, differences
from launcher.compare_code import Change, Code, CodeDiff, Ran, code_diffs, count_lines
from launcher.compare_learned import learned
from launcher.compare_views import as_object, as_text, hours, sparkline
from launcher.errors import Wrong
from launcher.views import width
from tests.launcher.conftest import Person
from tests.launcher.test_views import JOB

LINES = [
    {"t": 1, "step": 0, "event": "eval", "val/psnr": 9.0, "val/psnr_input": 9.5, "val/ssim": 0.1, "val/fid": 30.0},
    *({"t": 2, "step": n, "loss": 1 / n, "psnr": float(n), "lr": n * 1e-6, "applied": n - (n > 3), "it_s": 2.0}
      for n in range(1, 5)),
    {"t": 3, "step": 4, "event": "skipped", "reason": "exploded"},
    {"t": 3, "step": 5, "loss": "nan", "psnr": "nan", "lr": 5e-6, "applied": 4, "it_s": 4.0},
    {"t": 4, "step": 5, "event": "eval", "val/psnr": 21.5, "val/psnr_input": 23.5, "val/ssim": 0.8,
     "val/psnr_white": 13.3, "val/psnr_mean": 20.9, "val/fid": 40.0},
]


def test_a_jobs_numbers_are_those_of_its_last_steps_and_evaluation() -> None:
    found = learned(LINES, 1, {})
    assert (found.step, found.psnr, found.val_psnr, found.val_psnr_input) == (5, 2.5, 21.5, 23.5)
    assert (found.applied, found.attempted, found.skipped, found.lr, found.s_step) == (4, 5, 1, 5e-6, 0.25)
    assert (found.val_psnr_best, found.val_psnr_white, found.val_lpips, found.curve) == (21.5, 13.3, None, (9.0, 21.5))
    assert found.loss == pytest.approx((1 + 1 / 2 + 1 / 3 + 1 / 4) / 4)  # the step that was not finite is none
    assert found.evaluated["val/fid"] == {"last": 40.0, "best": 30.0}  # of a distance the least is the best
    assert found.evaluated["val/ssim"] == {"last": 0.8, "best": 0.8} and "val/psnr_white" not in found.evaluated


def test_a_job_that_said_nothing_has_no_numbers() -> None:
    empty = learned([], 0, {})
    assert learned([{"t": 1, "step": 0, "event": "resumed"}], 0, {}) == replace(empty, step=0) and empty.evaluated == {}
    assert learned([{"step": 3, "loss": 0.5}], 0, {}).skipped is None  # a program that counts no updates
    assert learned([{"step": 3, "loss": 0.5, "applied": 3}], 0, {}).skipped == 0


def test_only_keys_whose_values_differ_are_shown_and_a_missing_one_is_no_null() -> None:
    first = {"a": {"b": 1, "c": None}, "same": [1, 2]}
    found = differences([first, {"a": {"b": 2}, "same": [1, 2]}, first])
    assert set(found) == {"a.b", "a.c"}
    assert (found["a.b"], repr(found["a.c"])) == ((1, 2, 1), "(None, (absent), None)")
    assert differences([first]) == differences([first, first]) == {}


def test_the_words_in_which_commands_differ_with_their_option() -> None:
    first = ["python", "train.py", "--lr", "1e-4", "--seed", "0"]
    assert compare_facts.command([first, [*first[:3], "1e-3", *first[4:]]]) == ("--lr 1e-4", "--lr 1e-3")
    assert compare_facts.command([first, [*first, "--amp"]]) == ("-", "--amp") and compare_facts.command([first, first]) is None


# --- what surrounded them -----------------------------------------------------------------------------------

ENV = {"python": "3.11.7", "torch": "2.13.0", "gpus": ["GPU-1", "GPU-2"], "cards": ["NVIDIA H100"] * 2,
       "packages": {"aiohttp": "3.9", "torch": "2.13.0", "numpy": "2.1"}}


def test_an_environment_tells_what_matters_first_and_no_secret() -> None:
    facts = compare_facts.environment(ENV, {"env": {"WANDB_API_KEY": "hush", "NCCL_DEBUG": "INFO"}})
    assert list(facts) == ["Python", "torch", "GPUs", "package numpy", "package aiohttp", "$NCCL_DEBUG", "$WANDB_API_KEY"]
    assert facts["GPUs"] == "2 x NVIDIA H100" and "hush" not in facts.values()
    other = facts | {"package numpy": "1.26"}
    assert compare_facts.differing([facts, other, {}]) == {"package numpy": ("2.1", "1.26", None)}
    assert compare_facts.environment(None, {}) == {}


def test_a_value_is_reached_from_where_most_jobs_began_and_lost_time_counts() -> None:
    lines = [{"t": t, "step": step, "val/psnr": value} for t, step, value in
             ((3600, 0, 9.0), (10800, 10, 19.0), (18000, 20, 20.5), (21600, 30, 22.0))]
    spans = [Span(0.0, 7200.0, 2), Span(9000.0, 21600.0, 4)]  # the second attempt had more GPUs
    found = reached(lines, "val/psnr", 20, spans)
    assert found and found["first"] == 9.0 and found["up"] == {
        "step": 20, "value": 20.5, "wall_s": 18000.0, "gpu_s": 2 * 7200.0 + 4 * 9000.0}
    assert found["down"]["step"] == 0
    assert reached(lines, "val/psnr", 30, spans)["up"] is None and reached(lines, "loss", 1, spans) is None
    rested = reached(lines, "val/psnr", 20, [spans[0], replace(spans[1], rest_s=1500.0)])  # of the 1800 s between
    assert rested and rested["up"]["wall_s"] == 16500.0 and rested["up"]["gpu_s"] == found["up"]["gpu_s"]
    of_a_log = reached([{"step": 3, "loss": 0.5}], "loss", 0.6, spans)
    assert of_a_log and of_a_log["down"] == {"step": 3, "value": 0.5, "wall_s": None, "gpu_s": None}


# --- code ---------------------------------------------------------------------------------------------------

class Trees:
    """A node that keeps these snapshots."""

    def __init__(self, **trees: dict[str, str]) -> None:
        self.trees, self.asked = trees, 0

    def code_files(self, run_dir: str) -> dict[str, str] | None:
        self.asked += 1
        return self.trees.get(run_dir)

    def code_texts(self, run_dir: str, paths: list[str]) -> dict[str, str]:
        return {path: self.trees[run_dir][path] for path in paths if not path.endswith(".png")}

    def commits(self, directory: str, old: str, new: str) -> None:
        return None


def ran(node: Trees, name: str, **code: Any) -> Ran:
    return Ran(name, name, Code(**code), node)  # type: ignore[arg-type]


def test_code_is_told_file_by_file_against_the_first_jobs() -> None:
    node = Trees(a={"same.py": "x", "train.py": "1\n2\n3\n", "logo.png": "1", "old.py": "1\n"},
                 b={"same.py": "x", "train.py": "1\n3\n4\n5\n", "logo.png": "2", "new.py": "1\n2\n"})
    [found] = code_diffs([ran(node, "a", digest="1"), ran(node, "b", digest="2"), ran(node, "c", digest="2")], Path())
    assert found.jobs == ("b", "c") and found.changes == (
        Change("logo.png", "changed"), Change("new.py", "new", 2, 0), Change("old.py", "gone", 0, 1),
        Change("train.py", "changed", 2, 1))
    asked = node.asked
    assert code_diffs([ran(node, "a", digest="1"), ran(node, "b", digest="1")], Path()) == () and node.asked == asked
    [unknown] = code_diffs([ran(node, "a", digest="1"), ran(node, "b")], Path())
    assert unknown.changes is None and unknown.why == "not every job's code was recorded"
    assert count_lines("a\nb\n", "a\nb\n") == (0, 0)


def test_code_that_was_not_packed_is_told_by_commits_and_patches(tmp_path: Path) -> None:
    def git(*words: str) -> str:
        who = ["-c", "user.name=a", "-c", "user.email=a@b"]
        return subprocess.run(["git", *who, *words], cwd=tmp_path, check=True, capture_output=True, text=True).stdout

    git("init", "-q")
    shas = []
    for text in ("1\n", "1\n2\n"):
        (tmp_path / "train it.py").write_text(text)
        git("add", ".")
        git("commit", "-qm", "x")
        shas.append(git("rev-parse", "HEAD").strip())
    (tmp_path / "notes.txt").write_text("new\n")
    git("add", "-N", "notes.txt")
    state = worktree.state(tmp_path)
    assert state and state["dirty"]
    node = Trees()
    [found] = code_diffs([ran(node, "a", git_sha=shas[0]), ran(node, "b", git_sha=shas[1], patch=state["patch"])], tmp_path)
    assert found.changes == (Change("notes.txt", "changed", 1, 0), Change("train it.py", "changed", 1, 0))
    [found] = code_diffs([ran(node, "a", git_sha=shas[0]), ran(node, "b", git_sha="f" * 40)], tmp_path)
    assert found.changes is None and "neither this directory nor theirs" in found.why
    assert worktree.numstat(tmp_path, "--output=x", shas[0]) is None


# --- as a person sees it ------------------------------------------------------------------------------------

def compared(*names: str) -> Comparison:
    configs = [{"training": {"lr": 10.0 ** -n, "note": None}, "seed": 0} for n in range(len(names))]
    facts = compare_facts.environment(ENV, {})
    jobs = tuple(Compared(replace(JOB, id=f"phase3-{n}", name=name), configs[n], learned(LINES if n else [], n, {}),
                          Code("abc"), 1, spent=Spent(7200.0 * n, 28800.0 * n, {"useful": 5400.0 * n}), environment=facts,
                          inputs={"rig": "ab" * 32})
                 for n, name in enumerate(names))
    return Comparison(jobs, differences([one.config for one in jobs]))


def rows_of(text: str) -> dict[str, list[str]]:
    return {line.split("  ")[0]: line.split("  ", 1)[1].split() for line in text.splitlines()}


def test_few_jobs_have_a_column_each_and_nothing_empty_has_a_row() -> None:
    config, same, results = as_text(compared("생쥐", "mouse")).split("\n\n")
    assert config.splitlines() == ["config       생쥐  mouse", "training.lr  1     0.1"]
    assert same.splitlines() == ["the same code: snapshot abc",
                                 "the same environment: Python 3.11.7, torch 2.13.0, GPUs 2 x NVIDIA H100, 2 packages",
                                 "the same inputs: rig"]
    rows = rows_of(results)
    assert rows["id"] == ["phase3-0", "phase3-1"] and rows["val psnr"] == ["-", "21.50"] and rows["applied"] == ["-", "4/5"]
    assert (rows["wall h"], rows["GPU h"], rows["useful"][1:]) == (["0", "2.00"], ["0", "8.00"], ["75", "%"])
    assert rows["val/fid"] == ["-", "40", "(best", "30)"] and rows["curve"] == ["-", "▁█"]
    assert "node" not in rows and "attempts" not in rows and "val lpips" not in rows
    assert len({width(line) for line in results.splitlines()}) == 1


def test_many_jobs_have_a_row_each() -> None:
    config, _, results = as_text(compared(*"abcde")).split("\n\n")
    assert config.splitlines()[:2] == ["job  training.lr", "a    1"]
    titles, *rows = results.splitlines()
    assert titles.split()[:4] == ["job", "id", "state", "step"] and [row.split()[0] for row in rows] == [*"abcde"]
    assert rows[0].split()[3:7] == ["-"] * 4


def test_what_differs_is_told_narrowly_and_without_control_characters() -> None:
    found = compared("a", "b")
    first, second = found.jobs
    paths = tuple(f"/data/{'x' * 80}/{end}/list.txt" for end in ("mice", "rats"))
    diff = CodeDiff((second.job.id,), Code("1" * 64, "a" * 40), Code("2" * 64, "b" * 40, True),
                    (Change("train\x1b[2J.py", "changed", 12, 4), Change("new.py", "new", 3, 0), Change("w.bin", "gone")))
    found = replace(found, config={"data.path": paths, "training.note": (None, "x" * 99), "seed": (True, [1])}, code=(diff,),
                    jobs=(first, replace(second, environment=first.environment | {"torch": "2.12.0"}, inputs={"rig": "cd" * 32})))
    text = as_text(found)
    assert "\x1b" not in text and all(width(line) <= 100 for line in text.splitlines())
    config, code, environment, inputs, _ = text.split("\n\n")
    assert "…" in config and "mice/list.txt" in config and "rats/list.txt" in config
    assert code.splitlines() == [
        "code of b against a: 3 files, +15 -4", "  a: commit aaaaaaaaaa, snapshot 1111111111",
        "  b: commit bbbbbbbbbb with changes, snapshot 2222222222",
        "  train�[2J.py  +12 -4", "  new.py        new +3 -0", "  w.bin         gone"]
    assert environment.splitlines()[1].split() == ["torch", "2.13.0", "2.12.0"]
    assert inputs.splitlines()[1].split() == ["rig", "ab" * 6, "cd" * 6]


def test_what_is_not_known_is_said() -> None:
    bare = tuple(Compared(replace(JOB, id=f"command-{n}"), {}, learned([], 0, {}), argv=("run", f"--lr={n}")) for n in range(2))
    config, unknown, results = as_text(Comparison(bare, {})).split("\n\n")
    assert config.splitlines()[1].split() == ["(command)", "--lr=0", "--lr=1"]
    assert unknown.splitlines() == ["no config is known: none of them is a job of a stage", "no code is recorded",
                                    "no environment is recorded", "no fingerprint of an input is recorded"]
    assert [line.split()[0] for line in results.splitlines()] == ["result", "state"]


def test_what_a_value_cost_and_never() -> None:
    goal = Goal("val/psnr", 20.0, True, ({"step": 200, "value": 20.31, "wall_s": 1800.0, "gpu_s": 14400.0}, None))
    found = replace(compared("a", "b"), goals=(goal,))
    assert as_text(found).split("\n\n")[-1].splitlines() == [
        "to reach val/psnr ≥ 20", "cost        a      b", "step      200  never", "value   20.31      -",
        "wall h   0.50      -", "GPU h    4.00      -"]
    assert as_object(found)["jobs"][1]["reached"] == {"val/psnr": None}
    assert [hours(3600 * value) for value in (0.00123, 0.5, 12.34, 1234.5)] == ["0.0012", "0.50", "12.3", "1234"]


def test_the_course_of_a_number() -> None:
    assert sparkline([0, 1, 2, 3, 4, 5, 6, 7]) == "▁▂▃▄▅▆▇█"
    assert sparkline([3.0]) == "" and sparkline([1, 1]) == "▁▁" and len(sparkline(range(1000))) == 12


def test_the_object_leaves_out_what_a_job_does_not_have() -> None:
    found = as_object(compared("a", "b"))
    assert found["config"] == {"training.lr": {"phase3-0": 1.0, "phase3-1": 0.1}} and found["code"] == []
    assert found["jobs"][1]["skipped"] == 1 and found["jobs"][0]["psnr"] is None and found["jobs"][1]["gpu_s"] == 28800.0


def test_jobs_and_the_points_of_a_sweep_by_its_name(person: Person) -> None:
    person.run("submit", "tick", "--sweep", "steps=1,2", "--name", "length")
    person.run("wait", "length")
    for n, job in enumerate(json.loads(person.run("status", "length", "--json").stdout)):
        metrics = Path(job["run_dir"]) / "attempts/000/metrics.jsonl"
        metrics.write_text("".join(json.dumps(line) + "\n" for line in (LINES if n else LINES[:3])))
    config, same, results, goal = person.run("compare", "length", "--reach", "val/psnr=20").stdout.split("\n\n")
    assert config.splitlines()[1].split() == ["steps", "1", "2"] and same.startswith("the same code: snapshot ")
    rows = rows_of(results)
    assert (rows["result"], rows["state"], rows["step"]) == (["steps=1", "steps=2"], ["COMPLETED"] * 2, ["2", "5"])
    assert rows["wall h"] != ["-", "-"] and rows["GPU h"] == ["0", "0"]
    assert goal.splitlines()[0] == "to reach val/psnr ≥ 20" and rows_of(goal.partition("\n")[2])["step"] == ["never", "5"]
    first, second = json.loads(person.run("compare", "length", "--json").stdout)["jobs"]
    assert (first["point"], second["point"]) == ({"steps": "1"}, {"steps": "2"})
    assert (first["attempted"], second["attempted"], second["skipped"]) == (2, 5, 1)
    assert "psnr" in person.run("compare", "length", "--reach", "val/psn=20", code=2).stderr
    result_of_a_restart(person, first["id"], second["id"])
    (person.at / "more.py").write_text("one\ntwo\n")
    other = person.submit("tick", "--config", "failing")
    person.run("wait", other, code=1)
    said = person.run("compare", first["id"], other).stdout
    assert "fail" in said and f"code of {other} against {first['id']}: 1 file, +2 -0" in said and "  more.py  new +2 -0" in said
    assert "no such job" in person.run("compare", "nobody", code=2).stderr


def result_of_a_restart(person: Person, job: str, other: str) -> None:
    """One that made no step: the results are the first attempt's, and so is the config they are shown with."""
    person.run("restart", job, "--set", "steps=0")
    person.run("wait", job)
    shown = person.run("show", job).stdout
    assert "config.yaml of attempt 0, which made its newest steps" in shown and "\n  steps: 1\n" in shown
    assert "changed from the attempt before\n  attempt 1: steps 1 -> 0\n" in shown
    found = json.loads(person.run("compare", job, other, "--json").stdout)
    assert found["config"]["steps"] == {job: 1, other: 2}
    first, second = json.loads(person.run("show", job, "--json").stdout)["attempts"]
    took = first["ended_at"] - first["started_at"] + second["ended_at"] - second["started_at"]
    paused = second["started_at"] - first["ended_at"]
    assert 0 <= found["jobs"][0]["wall_s"] - took < paused / 2, (took, paused)


def test_a_file_that_cannot_be_written_is_told_before_anything_is_asked(tmp_path: Path) -> None:
    for verb, option, suffix in ((compare, "--plot", ".png"), (report, "-o", ".html")):
        with pytest.raises(Wrong, match=f"its name has to end with {suffix}"):
            verb.run(["nobody", option, "y.pdf"])
        with pytest.raises(Wrong, match=f"there is no directory '{tmp_path}/no' for y{suffix}"):
            verb.run(["nobody", option, f"{tmp_path}/no/y{suffix}"])


def test_what_a_restart_changed_in_words() -> None:
    found = past_configs.changes("a: {lr: 1.0, warmup: 20}\n", "a: {lr: 0.2}\nviews: [1, 2]\n")
    assert past_configs.in_words({"n": 1, "changes": found}) == \
        "attempt 1: a.lr 1 -> 0.2, a.warmup 20 -> (absent), views (absent) -> [1, 2]"
    assert past_configs.in_words({"n": 0, "changes": []}) == ""
