"""`launch check` and the checks of a submit, as a person meets them."""
from __future__ import annotations

import json
import shlex
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from cluster.errors import Unusable
from cluster.inventory import Node
from cluster.node.check import Found
from cluster.node.measured import Measure
from cluster.spec import Cost, JobSpec
from configs.yaml12 import dump
from jobs.data import toy
from launcher import check, check_again, check_once, reconcile, targets
from launcher.commands import check as command_line
from launcher.commands._common import here
from launcher.errors import Refused
from launcher.estimates import Known
from launcher.index import open_index
from launcher.stages import Request
from launcher.submit import Draft
from tests.launcher.conftest import Person

FOUND = {"check": "lists", "severity": "error", "what": "it names no sample", "where": "a.path",
         "why": "its lines are the samples", "fix": "launch check phase3"}


def looked(person: Person, *words: str, code: int = 0) -> dict[str, Any]:
    return json.loads(person.run("check", *words, "--json", code=code).stdout)


def asked_by(command: str) -> Request:
    """What a printed `launch check …` asks for."""
    launch, verb, *words = shlex.split(command)
    assert (launch, verb) == ("launch", "check")
    return command_line._request(command_line._parser().parse_args(words))


def data_at(person: Person) -> list[str]:
    toy.make(person.at / "toy", samples=2, val=1, size=16, seed=0)
    return ["phase3", "--config", "demo", "--gpus", "0", "--set", "training.dataset.path=toy/data_train.txt",
            "--set", "training.validation.path=toy/data_val.txt"]


def test_a_sound_stage(person: Person) -> None:
    found = looked(person, *data_at(person), "--quick")
    assert found["ok"] and [one["check"] for one in found["found"]] == ["estimate"]
    assert found["imports"] == {} and found["seconds"].keys() == {"quick"}
    assert json.loads(person.run("status", "--all", "--json").stdout) == []  # nothing was started
    said = person.run("check", "tick").stdout  # a stage without a schema
    assert "tick on local: nothing is in its way" in said


@pytest.mark.campaign
def test_quick_is_under_a_second_and_deep_under_five_beside_the_imports(person: Person) -> None:
    words = data_at(person)
    first, *more = [looked(person, *words) for _ in range(4)]
    assert first["imports"]["torch"] > 0 and first["ok"]
    found = [one["seconds"] for one in more]
    assert min(one["quick"] for one in found) < 1 and min(one["deep"] for one in found) < 5, found


def test_several_mistakes_are_told_at_once_and_a_submit_is_refused(person: Person) -> None:
    words = data_at(person)
    victim = (person.at / "toy/data_train.txt").read_text().split()[-1]
    (person.at / f"toy/{victim}/opencv_cameras.json").unlink()
    found = looked(person, *words, "--quick", "--set", "training.validation.path=/no/list.txt", "--gpus", "7", code=4)
    assert not found["ok"] and {one["check"] for one in found["found"]} == {"submit", "inputs", "lists", "estimate"}
    assert all(one["what"] and one["where"] and one["why"] and one["fix"] for one in found["found"])
    gone = next(one for one in found["found"] if one["check"] == "inputs")
    other = [*words[:-1], "training.validation.path=/path/on/local", "--gpus", "7"]  # in place of both that were given
    assert asked_by(gone["fix"]) == asked_by(shlex.join(["launch", "check", *other]))
    said = person.run("submit", *words, code=4).stderr
    assert victim in said and "--no-check" in said and len(said.splitlines()) <= 6
    person.run("submit", *words, "--no-check", "--dry-run")


def test_what_cannot_be_looked_at(person: Person) -> None:
    assert "name a node" in person.run("check", "tick", "--node", "any", code=2).stderr
    assert "no such stage" in person.run("check", "tock", code=2).stderr


def test_each_stage_of_a_pipeline_and_each_point_of_a_sweep(person: Person) -> None:
    stages = {"one": {"stage": "tick"}, "two": {"stage": "tick", "after": ["one"]}}
    (person.at / "configs/stages/both.yaml").write_text(dump({"about": "twice", "pipeline": stages}))
    found = looked(person, "both")
    assert (found["kind"], found["ok"], found["found"], list(found["members"])) == ("pipeline", True, [], ["one", "two"])
    assert found["members"]["two"]["seconds"].keys() == {"quick", "deep"}
    said = person.run("check", "both", "--quick", "--gpus", "7", code=4).stdout
    assert said.count("asks for 7 GPUs") == 2 and "pipeline both, 2 jobs: 2 of them cannot begin" in said
    sweep = looked(person, "tick", "--quick", "--sweep", "steps=3,4")
    assert sweep["ok"] and list(sweep["members"]) == ["steps=3", "steps=4"]
    assert json.loads(person.run("status", "--all", "--json").stdout) == []


def test_the_first_error_refuses_a_submit_and_warnings_are_told() -> None:
    node = Node("gpu05")
    with pytest.raises(Refused, match="a.path: it names no sample; and 1 more") as refused:
        check.refuse([FOUND, FOUND], node, REQUEST)
    assert refused.value.exit_code == 4 and "--no-check" in str(refused.value)
    assert "all of them: launch check phase3 --node gpu05\n" in str(refused.value)
    assert check.refuse([FOUND | {"severity": "warning"}, FOUND | {"severity": "info"}], node, REQUEST) == (
        "warning: a.path: it names no sample",)


@pytest.mark.parametrize("given", [
    {}, {"node": "lab:low", "nodes": 2, "gpus": 0, "time_s": 86_400.0}, {"share": True, "gpus": 1, "time_s": 90.5},
    {"config": "my demo.yaml", "resume": "healthy", "sets": ("a.b=it's [1, 2]", "c=${one.best}"), "time_s": 5400.0},
    {"sweeps": ("a=1,2", "b=x,'y,z'")}])
def test_a_printed_command_asks_for_the_same(given: dict[str, Any]) -> None:
    request = Request(here(), stage="phase3", **given)
    assert asked_by(check_again.check(request)) == request
    assert asked_by(check_again.calibrate(request).replace(" submit ", " check ")
                    .removesuffix(" --dry-run --calibrate")) == request
    [estimate] = check._estimated(drafted(cost=Cost("alike", steps=8)), request)
    assert estimate.fix == check_again.calibrate(request)
    assert check_again.words(Request(here(), stage="phase3")) == ("phase3",)


def test_a_node_without_data_and_no_such_job_are_findings(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The rest is looked at all the same, and the node is asked with the words that it prints again."""
    asked = []

    class Machine:
        def __init__(self, node: Node) -> None:
            pass

        def prepare(self, check: dict[str, Any], **_: Any) -> dict[str, Any]:
            asked.append(check)
            return {"now": time.time(), "home": "/home/me", "found": [FOUND], "gpus": [], "stats": {}}

    monkeypatch.setattr(reconcile, "backend_of", Machine)
    monkeypatch.setattr(targets, "resolve", lambda *_: targets.Target(Node("gpu05", data=None)))
    request = replace(REQUEST, start=tmp_path, config="demo", gpus=2, resume="nobody")
    with open_index(tmp_path / "index") as index:
        result, _ = check.look_at(index, request, deep=False)
    told = {one.check: one.what for one in result.found}
    said = [one.what for one in result.found if one.check == "submit"]
    assert any(text.startswith("training.dataset.path, training.validation.path: relative") for text in said)
    assert any("no such job" in text for text in said) and any("2 GPUs" in text for text in said) and "lists" in told
    assert asked[-1]["again"] == ("phase3", "--node", "gpu05", "--gpus", "2", "--config", "demo", "--resume", "nobody")


def test_one_problem_is_one_finding() -> None:
    def found(what: str, check: str, where: str) -> Found:
        return Found(check, "error", what, where, "", "")

    gone, list_gone = found("there is no /x", "inputs", "init_from"), found("there is no /l", "inputs", "a.path")
    some = found("1 of 3 samples looked at (of 3) have no opencv_cameras.json: s1", "lists", "b.path: /b.txt")
    resume = found("--resume: there is no /none on this node", "submit", "gpu05")
    sees = found("a.path: there is no /l on this node", "submit", "gpu05")
    quick = check_once.of_submit([sees, resume, gone, list_gone, some])
    assert quick == [resume, gone, list_gone, some]
    other = [found("s10: no picture", "samples", "b.path"), found("no gradient", "updates", "model"),
             found("n_layer", "checkpoint", "pretrained")]
    again = [found("/l: No such file", "samples", "a.path"), found("cannot be read", "checkpoint", "init_from"),
             found("s1: no cameras", "samples", "b.path"), found("no such", "checkpoint", "resume")]
    assert check_once.not_told([*again, *other], quick) == other


def test_details_come_after_what_to_do() -> None:
    one = Found("checkpoint", "error", "n is 5 here and 4 there: --set n=4\nmodel: 12 only here", "resume", "why", "fix")
    assert [line.strip() for line in check.told([one])][1:] == ["why", "fix", "model: 12 only here"]
    quick = check.Checked("phase3", "gpu05", seconds={"quick": 0.1})
    assert "nothing that --quick looks at is in its way" in check.as_text(quick)


def test_every_machine_of_a_job_is_asked(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Its inputs and ports are looked at on each; what the first has told is not told again."""
    class Machine:
        def __init__(self, node: Node) -> None:
            self.name = node.name

        def prepare(self, check: dict[str, Any]) -> dict[str, Any]:
            if self.name == "gpu03":
                raise Unusable("the workdir cannot take a job", self.name)
            assert check["node"] == self.name and check["ports"] == [29500]
            own = [FOUND | {"what": "port 29500 is in use"}] if self.name == "gpu02" else []
            return {"now": time.time() + (7 if self.name == "gpu02" else 0), "found": [FOUND, *own]}

    (tmp_path / "configs/stages").mkdir(parents=True)
    (tmp_path / "configs/stages/many.yaml").write_text("about: a\ncommand: ['true']\npass_config: true\n"
                                                       "default_config: one\nenv: {MASTER_PORT: '29500'}\n")
    (tmp_path / "configs/runs/many").mkdir(parents=True)
    (tmp_path / "configs/runs/many/one.yaml").write_text("steps: 3\n")
    monkeypatch.setattr(reconcile, "backend_of", Machine)
    ready = replace(drafted(prepared={"found": [FOUND]}), others=(Node("gpu02"), Node("gpu03")))
    sure = check._Collected("gpu05")
    found = list(check._of_others(ready, Request(tmp_path, stage="many", node="gpu05"), sure))
    assert [one.what for one in sure.found] == ["the workdir cannot take a job"] and sure.found[0].where == "gpu03"
    assert [(one.check, one.where) for one in found] == [("clock", "gpu02"), ("lists", "gpu02: a.path"),
                                                         ("clock", "gpu02, gpu05")]


UNKNOWN = Known(None, 1e9)


def drafted(known: Known = UNKNOWN, **fields: Any) -> Draft:
    prepared = fields.pop("prepared", {})
    spec = JobSpec("j", "t", "phase3", "python", ("x",), "gpu05", **fields)
    return Draft(spec, Node("gpu05"), None, None, True, known=known, prepared=prepared)


MEASURE = Measure("alike", "phase3-abc", 0.0, "gpu05", "NVIDIA H100", True, 100, 2.0, 10.0, 0.0, 0.0, None, 10**9, 0, 0)
REQUEST = Request(Path("/"), stage="phase3", node="gpu05")


def test_disk_and_time_by_what_was_measured() -> None:
    cost = Cost("alike", steps=1800, checkpoints=4)
    found = list(check._estimated(drafted(Known(MEASURE, 3e9), cost=cost, time_s=1800.0), REQUEST))
    assert [(one.check, one.severity) for one in found] == [("disk", "error"), ("time", "warning")]
    assert "it will write 4 GB, 3 GB are free" in found[0].what and "1 h 0 min" in found[1].what
    [disk] = check._estimated(drafted(Known(MEASURE, 4.5e9), cost=cost), REQUEST)
    assert disk.severity == "warning"
    assert list(check._estimated(drafted(Known(MEASURE, 1e12), cost=cost, time_s=86_400.0), REQUEST)) == []


def test_clocks_and_gpus_that_others_have() -> None:
    assert "100 s behind" in list(check.clock("gpu05", 900.0, 1000.0, 1001.0))[0].what
    assert "99 s ahead" in list(check.clock("gpu05", 1100.0, 1000.0, 1001.0))[0].what
    assert list(check.clock("gpu05", 1000.5, 1000.0, 1001.0)) == []
    assert list(check.apart({})) == list(check.apart({"gpu01": (9.0, 9.2), "gpu02": (10.0, 10.5)})) == []
    [apart] = check.apart({"gpu01": (9.0, 9.2), "gpu02": (-1.0, 0.2), "gpu03": (0.0, 0.1)})
    assert apart.what == "the clock of gpu01 is 9 s ahead of that of gpu03" and apart.severity == "warning"
    gpus = [{"index": index, "uuid": f"GPU-{index}"} for index in range(2)]
    busy = {"GPU-1": "bob job phase1-abc pid 7 since 14:02"}
    [waits] = check._waits(drafted(gpus=2, prepared={"gpus": gpus, "busy": busy}))
    assert "GPU 1: bob job phase1-abc" in waits.what and waits.severity == "warning"
    assert list(check._waits(drafted(gpus=1, prepared={"gpus": gpus, "busy": busy}))) == []
