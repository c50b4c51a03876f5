"""A pipeline's file: what each stage waits for and takes, which run file it gets, and mistakes with their line."""
from __future__ import annotations

import re
from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.load import load_run, load_stage
from configs.pipeline import Member, load_pipeline

STAGE = "about: x\npython: a.py\ndefault_config: small\n"
FILE = """\
about: three in a row
pipeline:
  first: {gpus: 2}
  second:
    stage: other
    takes: {model.checkpoint: "${first.checkpoints.best}"}
    set: {steps: 7}
  third: {stage: first}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    stages, runs = tmp_path / "configs" / "stages", tmp_path / "configs" / "runs"
    stages.mkdir(parents=True)
    (stages / "first.yaml").write_text(STAGE)
    (stages / "other.yaml").write_text(STAGE)
    (stages / "line.yaml").write_text(FILE)
    for stage, text in {"first": "steps: 3\nmode: full\n", "other": "steps: 4\nmodel: {checkpoint: null}\n"}.items():
        (runs / stage).mkdir(parents=True)
        (runs / stage / "small.yaml").write_text(text)
    (runs / "first" / "large.yaml").write_text("steps: 300\nmode: full\n")
    (runs / "line").mkdir()
    return tmp_path


def members(project: Path, text: str | None = None, run: str | None = None, *sets: str) -> dict[str, Member]:
    if text is not None:
        (project / "configs" / "stages" / "line.yaml").write_text(text)
    found = load_pipeline(load_stage("line", project), run, list(sets), project)
    return {member.label: member for member in found}


def values(project: Path, member: Member) -> dict[str, object]:
    return load_run(member.stage, member.config, list(member.sets), project).data


def test_each_waits_for_what_it_takes_from_else_for_the_one_before(project: Path) -> None:
    found = members(project)
    assert {label: one.after for label, one in found.items()} == {
        "first": (), "second": ("first",), "third": ("second",)}
    assert [one.stage.name for one in found.values()] == ["first", "other", "first"]
    assert found["first"].entry.gpus == 2
    assert values(project, found["second"]) == {"steps": 7, "model": {"checkpoint": "${first.checkpoints.best}"}}
    assert members(project, FILE.replace("{stage: first}", "{stage: first, after: []}"))["third"].after == ()
    both = FILE.replace("{stage: first}", "{stage: first, after: [first, second], any: true}")
    assert members(project, both)["third"].after == ("first", "second")


def test_a_run_file_has_a_section_for_each_stage(project: Path) -> None:
    (project / "configs" / "runs" / "line" / "quick.yaml").write_text("first: large\nthird:\n  steps: 9\n")
    found = members(project, FILE, "quick")
    assert values(project, found["first"])["steps"] == 300
    assert values(project, found["third"]) == {"steps": 9}
    assert values(project, found["second"])["steps"] == 7


def test_set_addresses_a_stage_or_all_that_have_the_key(project: Path) -> None:
    found = members(project, FILE, None, "third.steps=1", "mode=test", "+first.new=[1, 2]", "steps=2")
    assert values(project, found["first"]) == {"steps": 2, "mode": "test", "new": [1, 2]}
    assert values(project, found["third"]) == {"steps": 2, "mode": "test"}
    assert values(project, found["second"])["steps"] == 2


@pytest.mark.parametrize(("old", "new", "line", "said"), [
    ("{gpus: 2}", "{gpu: 2}", 3, "nearest: gpus"),
    ("{gpus: 2}", "{gpus: -1}", 3, "gpus"),
    ("{gpus: 2}", "{stage: firts}", 3, "nearest: first"),
    ("{gpus: 2}", "{stage: line}", 3, "a pipeline inside a pipeline"),
    ("{gpus: 2}", "{time: soon}", 3, "no duration"),
    ("${first.", "${frist.", 6, "nearest: first"),
    ("${first.", "${third.", 6, "stands behind"),
    ("checkpoints.best}", "checkpoint}", 6, "must be ${LABEL.checkpoints.last}"),
    ("model.checkpoint:", "model.chekpoint:", 6, "nearest: model.checkpoint"),
    ("steps: 7", "stepz: 7", 7, "nearest: steps"),
    ("{stage: first}", "{stage: first, after: [secnd]}", 8, "nearest: second"),
    ("third:", "th.rd:", 8, "a label is"),
    ("about: three", "gpus: 2\nabout: three", 1, "gpus"),
    ("about: three", "grace_s: 2\nabout: three", 1, "belongs to a stage"),
    ("about: three", "python: x.py\nabout: three", None, "exactly one of"),
])
def test_a_mistake_is_named_with_its_line(project: Path, old: str, new: str, line: int | None, said: str) -> None:
    assert old in FILE
    with pytest.raises(ConfigError) as caught:
        members(project, FILE.replace(old, new, 1))
    assert said in str(caught.value)
    assert f"line.yaml:{line}" in str(caught.value) if line else "line.yaml" in str(caught.value)


@pytest.mark.parametrize(("text", "sets", "said"), [
    ("frist: large\n", (), "nearest: first"), ("first: 3\n", (), "name of a run file"), ("- first\n", (), "a mapping"),
    ("first: larg\n", (), "nearest: large"), ("", ("stepz=1",), "no stage of the pipeline"),
    ("", ("third.stepz=1",), "nearest: steps")])
def test_a_mistake_in_a_run_file_or_a_set(project: Path, text: str, sets: tuple[str, ...], said: str) -> None:
    (project / "configs" / "runs" / "line" / "quick.yaml").write_text(text)
    with pytest.raises(ConfigError) as caught:
        for member in members(project, FILE, "quick", *sets).values():
            values(project, member)
    assert said in str(caught.value)


def test_the_example_of_the_documents_is_valid(project: Path) -> None:
    document = (Path(__file__).parents[2] / "docs" / "pipelines.md").read_text()
    [text] = re.findall(r"^```yaml\n(.*?)^```", document, re.MULTILINE | re.DOTALL)
    for name in ("phase1", "phase2", "phase3"):
        (project / "configs" / "stages" / f"{name}.yaml").write_text(STAGE)
        (project / "configs" / "runs" / name).mkdir()
        run = "checkpoint: null\ndata: null\ntraining: {max_steps: 1}\n"
        (project / "configs" / "runs" / name / "small.yaml").write_text(run)
    found = members(project, text)
    assert {label: one.after for label, one in found.items()} == {
        "phase1": (), "phase2": ("phase1",), "phase3": ("phase2",)}
