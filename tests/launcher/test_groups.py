"""--after, sweeps and pipelines as a person meets them, on the node `local`, with real supervisors."""
from __future__ import annotations

import json
import sqlite3
import time
from pathlib import Path

import pytest

from launcher import groups, held
from launcher.index import open_index
from launcher.stages import Request
from tests.launcher.conftest import Person

_GIVE = '''\
import json, os, pathlib, sys, time
sys.path.insert(0, os.environ["OURS"])
from cluster.contract import MANIFEST, checkpoint_name, sha256_file, write_artifact_manifest

settings = dict(line.split(": ", 1) for line in open(sys.argv[1]).read().splitlines())
run = pathlib.Path(os.environ["LAUNCH_RUN_DIR"])
gate = pathlib.Path(settings["gate"])
while gate.name != "open" and not gate.exists():
    time.sleep(0.02)
if settings["fail"] == "true":
    raise RuntimeError("no cheese")
attempt = int(os.environ["LAUNCH_ATTEMPT"])
path = run / "checkpoints" / checkpoint_name(7, attempt)
path.mkdir()
(path / "model.safetensors").write_text(settings["steps"])
files = {"model.safetensors": {"size": len(settings["steps"]), "sha256": sha256_file(path / "model.safetensors")}}
(path / MANIFEST).write_text(json.dumps({"version": 1, "job": run.name, "attempt": attempt, "step": 7,
                                         "resumed_from": None, "files": files}))
(run / "artifacts" / "samples").mkdir(exist_ok=True)
(run / "artifacts" / "samples" / "steps").write_text(settings["steps"])
write_artifact_manifest(run / "artifacts" / "samples", run.name, attempt)
print("gave", settings["steps"], flush=True)
'''
_TAKE = '''\
import pathlib, sys, yaml
settings = yaml.safe_load(open(sys.argv[1]))
print("took", pathlib.Path(settings["model"], "model.safetensors").read_text(),
      pathlib.Path(settings["data"], "steps").read_text(), settings["mode"], flush=True)
'''
_FILES = {
    "stages/give.yaml": "about: x\npython: give.py\ndefault_config: small\nrestart: {max_restarts: 0}\n",
    "stages/take.yaml": "about: x\npython: take.py\ndefault_config: small\nrestart: {max_restarts: 0}\n"
                        "paths: [model, data]\n",
    "runs/give/small.yaml": "steps: 3\ngate: open\nfail: false\n",
    "runs/take/small.yaml": "model: null\ndata: null\nmode: full\n",
    "stages/line.yaml": """\
about: one gives, one takes, one counts
pipeline:
  first: {stage: give}
  second:
    stage: take
    takes: {model: "${first.checkpoints.best}", data: "${first.artifacts.samples}"}
  third: {stage: tick, set: {steps: 1}}
""",
}


@pytest.fixture
def maker(person: Person) -> Person:
    (person.at / "give.py").write_text(_GIVE)
    (person.at / "take.py").write_text(_TAKE)
    for name, text in _FILES.items():
        path = person.at / "configs" / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    (person.at / "configs" / "cluster.yaml").write_text(
        f"nodes: {{local: {{via: local, env_vars: {{OURS: {person.env['PYTHONPATH']!r}}}}}}}\n")
    return person


def statuses(person: Person, *words: str) -> dict[str, dict]:
    return {one["name"] or one["id"]: one for one in json.loads(person.run("status", "--json", *words).stdout)}


# --- --after ------------------------------------------------------------------------------------------------

def test_a_job_waits_for_another_and_says_so(person: Person, tmp_path: Path) -> None:
    first = person.submit("tick", "--name", "one", "--set", f"gate={tmp_path}/gate")
    second = person.submit("--after", "one", "--", "echo", "second")
    person.until(second, lambda found: first in found["detail"] and found["state"] == "PENDING")
    assert f"{first} (RUNNING" in person.run("status").stdout
    (tmp_path / "gate").touch()
    person.run("wait", first, second)
    assert person.run("logs", second).stdout == "second\n"
    done = person.submit("--after", "one", "--", "true")
    person.run("wait", done)


def test_when_the_other_fails_it_is_cancelled_unless_any_end_will_do(person: Person, tmp_path: Path) -> None:
    first = person.submit("tick", "--config", "failing", "--set", f"gate={tmp_path}/gate")
    second = person.submit("tick", "--after", first)
    other = person.submit("tick", "--after", f"{first}:any")
    (tmp_path / "gate").touch()
    person.run("wait", other)
    said = person.run("wait", second, code=1).stderr
    assert "CANCELLED" in said and f"{first} FAILED" in said and "the mouse ran away" in said
    refused = person.run("submit", "tick", "--after", first, code=4).stderr
    assert f"{first} FAILED" in refused and f"--after {first}:any" in refused
    said = person.run("restart", first, "--set", "fail=false").stderr
    assert f"launch restart {second}" in said and person.status(second)["state"] == "CANCELLED"
    person.run("wait", first)


def test_what_is_named_after_a_job_is_taken_from_it(maker: Person) -> None:
    first = maker.submit("give", "--set", "steps=42")
    second = maker.submit("take", "--after", first, "--set", f"model=${{{first}.checkpoints.last}}",
                          "--set", f"data=${{{first}.artifacts.samples}}")
    maker.run("wait", first, second)
    assert maker.run("logs", second).stdout == "took 42 42 full\n"
    said = maker.run("submit", "take", "--set", "model=${nobody.checkpoints.last}", code=2).stderr
    assert "no job called 'nobody'" in said


# --- sweeps -------------------------------------------------------------------------------------------------

def test_a_sweep_is_one_job_for_each_point_under_one_name(person: Person) -> None:
    assert person.submit("tick", "--sweep", "steps=2,4", "--sweep", "fail=false,true", "--name", "쥐") == "쥐"
    said = person.run("wait", "쥐", code=1).stderr
    assert said.count("COMPLETED") == 2 and said.count("FAILED") == 2
    found = statuses(person, "쥐")
    assert list(found) == ["쥐/0", "쥐/1", "쥐/2", "쥐/3"]
    assert found["쥐/3"]["group"]["point"] == {"steps": "4", "fail": "true"}
    assert [one["total"] for one in found.values()] == [2, 2, 4, 4]
    table = person.run("status", "쥐").stdout
    assert "fail=false steps=2" in table and "fail=true steps=4" in table
    assert "step 4 of 4" in person.run("logs", "쥐/2").stdout
    said = person.run("logs", "쥐", code=2).stderr
    assert "a sweep of 4 jobs" in said and "쥐/0, 쥐/1" in said
    assert person.run("restart", "쥐", "--set", "fail=false").stdout.count("\n") == 2
    person.run("wait", "쥐")
    again = person.submit("tick", "--sweep", "steps=1,2", "--name", "쥐")
    person.run("wait", again)
    assert list(statuses(person, "쥐")) == ["쥐/0", "쥐/1"]


def test_so_many_points_run_at_a_time_and_all_are_killed_at_once(person: Person, tmp_path: Path) -> None:
    name = person.submit("tick", "--sweep", "steps=2,3,4,5", "--parallel", "2", "--set", f"gate={tmp_path}/gate")
    assert name.startswith("tick-")
    person.until(f"{name}/1", lambda found: found["step"] == 1)
    person.until(f"{name}/3", lambda found: "its turn" in found["detail"])
    states = [one["state"] for one in statuses(person, name).values()]
    assert states == ["RUNNING", "RUNNING", "PENDING", "PENDING"]
    said = person.run("kill", name).stdout
    assert said.count("CANCELLED") == 4 and "already" not in said
    assert {one["state"] for one in statuses(person, name[:-1]).values()} == {"CANCELLED"}
    runs = Path(person.env["LAUNCH_WORKDIR"]) / "runs"
    assert not (runs / f"{name}-2" / "attempts" / "000" / "logs" / "rank-0.log").exists()


def test_a_sweep_is_all_or_nothing(person: Person) -> None:
    assert "steps" in person.run("submit", "tick", "--sweep", "stepz=1,2", code=2).stderr
    (person.at / "configs" / "stages" / "tick.yaml").write_text(
        "about: x\npython: tick.py\ndefault_config: quick\nprogress: {step: '(['}\n")
    person.run("submit", "tick", "--sweep", "steps=1,2", code=2)
    runs = Path(person.env["LAUNCH_WORKDIR"]) / "runs"
    assert not runs.exists() or not list(runs.iterdir())


def test_a_dry_run_of_a_sweep_shows_its_points(person: Person) -> None:
    said = person.run("submit", "tick", "--sweep", "steps=1,2", "--sweep", "gate=open,shut", "--dry-run").stdout
    assert ("gate=shut steps=2" in said or "steps=2 gate=shut" in said) and "tick.py" in said
    assert json.loads(person.run("status", "--all", "--json").stdout) == []


@pytest.mark.parametrize(("words", "code", "said"), [
    (["tick", "--sweep", "steps"], 2, "KEY=V1,V2"), (["tick", "--sweep", "steps=1,,2"], 2, "empty value"),
    (["tick", "--sweep", "steps=[1,2"], 2, "not closed"), (["tick", "--sweep", "steps=1,1"], 2, "twice"),
    (["tick", "--sweep", "steps=1", "--sweep", "steps=2"], 2, "given twice"),
    (["tick", "--parallel", "2"], 2, "--parallel belongs to --sweep"), (["tick", "--parallel", "0"], 2, "at least 1"),
    (["--sweep", "a=1", "--", "true"], 2, "belongs to a stage"), (["tick", "--after", "nothing"], 2, "no such job"),
    (["line", "--sweep", "a=1"], 2, "line is a pipeline"), (["line", "--resume", "never"], 2, "line is a pipeline"),
    (["line", "--set", "firts.steps=1"], 2, "no stage of the pipeline"),
    (["line", "--set", "first.stepz=1"], 2, "nearest: steps"), (["line", "--node", "lokal"], 2, "nearest: local"),
])
def test_mistakes(maker: Person, words: list[str], code: int, said: str) -> None:
    assert said in maker.run("submit", *words, code=code).stderr


# --- pipelines ----------------------------------------------------------------------------------------------

def test_a_pipeline_runs_through_and_hands_over(maker: Person) -> None:
    done = maker.run("submit", "line", "--set", "first.steps=5", "--set", "mode=test", "--name", "p", "--follow")
    assert done.stdout.startswith("gave 5\ntook 5 5 test\nattempt 0") and "--- p.second (2 of 3, takes first.checkpoints.best, first.artifacts.samples) ---" in done.stderr
    found = statuses(maker, "p")
    assert list(found) == ["p.first", "p.second", "p.third"]
    assert {one["state"] for one in found.values()} == {"COMPLETED"}
    shown = maker.run("show", "p.second").stdout
    first = found["p.first"]["id"]
    assert "${first.checkpoints.best}" in shown and "step 7, sha256" in shown and f"of {first}" in shown
    assert f"runs/{first}/checkpoints/step-00000007-a000" in shown
    inputs = json.loads(maker.run("show", "p.second", "--json").stdout)["taken_over"]
    assert [one["reference"] for one in inputs] == ["${first.checkpoints.best}", "${first.artifacts.samples}"]


def test_a_dry_run_of_a_pipeline_shows_who_waits_for_whom(maker: Person) -> None:
    said = maker.run("submit", "line", "--dry-run").stdout
    rows = {line.split()[0] if line.split()[0] != "line" else line.split()[1]: line for line in said.splitlines() if line}
    assert "first" in rows["second"] and "first.checkpoints.best" in rows["second"] and "second" in rows["third"]
    assert json.loads(maker.run("status", "--all", "--json").stdout) == []


def test_a_stage_that_fails_stops_what_depends_on_it_and_a_restart_goes_on(maker: Person) -> None:
    name = maker.submit("line", "--set", "first.fail=true")
    said = maker.run("wait", name, code=1).stderr
    assert "no cheese" in said and f"{name}-first FAILED" in said and f"{name}-second CANCELLED" in said
    states = [one["state"] for one in statuses(maker, name).values()]
    assert states == ["FAILED", "CANCELLED", "CANCELLED"]
    done = maker.run("restart", f"{name}.first", "--set", "fail=false")
    assert done.stdout.split() == [f"{name}-first", f"{name}-second", f"{name}-third"]
    maker.run("wait", name)
    assert maker.run("logs", f"{name}.second").stdout == "took 3 3 full\n"
    done = maker.run("restart", f"{name}.second")
    assert done.stdout.split() == [f"{name}-second", f"{name}-third"]
    maker.run("wait", name)
    assert [one["attempt"] for one in statuses(maker, name).values()] == [1, 2, 2]
    assert "none of its 3 jobs has failed" in maker.run("restart", name, code=2).stderr


def test_restarting_a_pipeline_is_restarting_what_failed_of_it(maker: Person) -> None:
    name = maker.submit("line", "--set", "first.fail=true")
    maker.run("wait", name, code=1)
    done = maker.run("restart", name, "--set", "fail=false")
    assert done.stdout.split() == [f"{name}-first", f"{name}-second", f"{name}-third"]
    maker.run("wait", name)


def test_what_waits_again_is_not_waited_for(maker: Person, tmp_path: Path) -> None:
    name = maker.submit("line", "--set", "first.fail=true")
    maker.run("wait", name, code=1)
    begun = time.monotonic()
    said = maker.run("restart", name, "--set", "fail=false", "--set", f"gate={tmp_path}/gate").stderr
    assert f"when it need not wait any more: {name}-first (" in said and time.monotonic() - begun < 30
    (tmp_path / "gate").touch()
    maker.run("wait", name)


def test_a_pipeline_is_killed_by_its_name(maker: Person, tmp_path: Path) -> None:
    name = maker.submit("line", "--set", f"first.gate={tmp_path}/gate", "--name", "mouse")
    maker.until("mouse.third", lambda found: "-second (PENDING" in found["detail"])
    assert f"{statuses(maker, 'mouse')['mouse.second']['id']} (PENDING" in maker.run("status").stdout
    assert maker.run("kill", name).stdout.count("CANCELLED") == 3
    assert "mouse" in maker.run("submit", "line", "--name", "mouse", "--set", "first.fail=x", "--dry-run").stdout


def test_an_artifact_that_is_not_there_is_named_with_its_job(maker: Person) -> None:
    stage = maker.at / "configs" / "stages" / "line.yaml"
    stage.write_text(stage.read_text().replace("artifacts.samples", "artifacts.simples"))
    name = maker.submit("line")
    said = maker.run("wait", name, code=1).stderr
    assert "artifacts.simples" in said and f"{name}-first" in said and "could not be started" in said


def test_a_client_that_dies_between_two_stages_leaves_nothing_half_submitted(maker: Person) -> None:
    """What it wrote down first is taken up by the next command."""
    index = Path(maker.env["LAUNCH_HOME"]) / "index.sqlite"
    with open_index(index) as opened:
        held.hold(opened, groups.draft_any(opened, Request(maker.at, stage="line", name="late"), False))
    with sqlite3.connect(index) as db:
        db.execute("UPDATE held SET pid = 1 << 30")
    said = maker.run("status").stderr
    assert said.count("is submitted to local now") == 3
    maker.run("wait", "late")
    assert list(statuses(maker, "late")) == ["late.first", "late.second", "late.third"]
    assert not list((index.parent / "held").glob("*.tar"))


def test_what_an_earlier_client_left_does_not_spoil_another_pipeline(maker: Person) -> None:
    """Its node does not answer; that of the new one does."""
    clusters = maker.at / "configs" / "cluster.yaml"
    clusters.write_text(clusters.read_text().replace("{local:", "{gone: {via: ssh, host: gone.invalid}, local:"))
    index = Path(maker.env["LAUNCH_HOME"]) / "index.sqlite"
    with open_index(index) as opened:
        held.hold(opened, groups.draft_any(opened, Request(maker.at, stage="line", name="old"), False))
    with sqlite3.connect(index) as db:
        db.execute("UPDATE held SET pid = 1 << 30, node = 'gone'")
    done = maker.run("submit", "line", "--name", "new")
    assert done.stdout == "new\n" and "new: 3 jobs on local" in done.stderr
    maker.run("wait", "new")


def test_code_that_was_not_kept_any_more_is_said(maker: Person) -> None:
    index = Path(maker.env["LAUNCH_HOME"]) / "index.sqlite"
    with open_index(index) as opened:
        rows = held.hold(opened, groups.draft_any(opened, Request(maker.at, stage="line", name="late"), False))
    with sqlite3.connect(index) as db:
        db.execute("UPDATE held SET pid = 1 << 30")
    for code in {row.code for row in rows}:
        Path(code or "").unlink()
    assert "late-" in (said := maker.run("status").stderr) and "its code was not kept" in said
    assert "is held" not in maker.run("status").stderr
