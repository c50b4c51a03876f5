"""`launch doctor` and the health beside the state, as a person sees them."""
from __future__ import annotations

import json
import math
import shlex
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from cluster.contract import MANIFEST_VERSION
from launcher.doctor import Diagnosis, as_text, lost
from launcher.errors import Failed
from launcher.plots import png, terminal
from launcher.views import width
from tests.launcher.conftest import Person
from tests.launcher.test_report import FINDING, by_hand
from tests.launcher.test_views import JOB
from tests.node.test_rules import FACE_VOICE, face_voice_log, run

CURVE = [[step, 1 / step, 1 / step, 1 / step] for step in range(1, 101)]


def test_a_curve_in_a_terminal() -> None:
    lines = terminal("loss", CURVE, 40, 5, (50, 75)).splitlines()
    assert len(lines) == 8 and all(width(line) <= 40 for line in lines)
    assert lines[0] == "loss (by powers of ten)" and lines[1].split()[0] == "1" and lines[5].split()[0] == "0.01"
    assert lines[6].strip() == "▔" * len(lines[6].strip()) and 8 <= len(lines[6].strip()) <= 11
    assert lines[7].split() == ["1", "step", "100"]


def test_findings_are_wrapped_and_have_their_curve_once() -> None:
    found = Diagnosis(JOB, "sick", "its metrics", [FINDING, FINDING | {"rule": "lr-stuck", "first": None}],
                      {"loss": CURVE, "grad_norm": CURVE}, None, [], {}, [])
    text = as_text(found, 60)
    assert all(width(line) <= 60 for line in text.splitlines())
    assert [line.split()[0] for line in text.splitlines() if "powers of ten" in line] == ["grad_norm", "loss"]
    assert "warning: updates-skipped  steps 40 to 90" in text and "  fix   launch restart mouse --set a.lr=1e-5" in text


def test_the_lost_time_leaves_out_what_took_none() -> None:
    assert lost({"wall": 200.0, "useful": 150.0, "queue": 50.0, "stall": 0.0}) == [("useful", "2 min", 0.75), ("queue", "50 s", 0.25)]
    assert lost({}) == []


def test_a_sick_run_is_told_in_status_and_doctor(person: Person) -> None:
    sick = by_hand(person, "face-by-hand-1", run(loss=lambda n: math.log(16) + 0.001 * (n % 5)))
    well = by_hand(person, "face-by-hand-2", run())
    table = person.run("status", "--all").stdout
    assert table.splitlines()[0].split()[3:5] == ["state", "health"] and "COMPLETED  sick" in table and "COMPLETED  ok" in table
    assert {one["health"] for one in json.loads(person.run("status", "--all", "--json").stdout)} == {"sick", "ok"}
    said = person.run("doctor", sick.name, code=1)
    assert "error: at-chance" in said.stdout and "at chance: ln 16 = 2.773" in said.stdout and "step 400" in said.stdout
    found = json.loads(person.run("doctor", sick.name, "--json", code=1).stdout)
    assert (found["health"], found["findings"][0]["rule"], found["findings"][0]["fix"]) == ("sick", "at-chance", f"launch logs {sick.name}")
    assert "nothing is wrong that can be seen in its metrics" in person.run("doctor", well.name).stdout
    assert found["goodput"]["useful"] == pytest.approx(399, abs=1)


def test_another_persons_program_is_judged_by_its_output_alone(person: Person) -> None:
    (person.at / "recorded.log").write_bytes(face_voice_log())
    (person.at / "configs/stages/face.yaml").write_text(
        "about: a recorded run\ncommand: [cat, recorded.log]\nresources: {gpus: 0}\n" + "progress:\n"
        + "".join(f"  {name}: '{rule}'\n" for name, rule in FACE_VOICE.items()))
    job = person.submit("face")
    person.run("wait", job)
    said = person.run("doctor", job, code=1).stdout
    assert "at chance: ln 16 = 2.773" in said and "step 46" in said and person.status(job)["health"] == "sick"
    silent = person.submit("--", "true")
    person.run("wait", silent)
    assert "nothing can be seen of its learning" in person.run("doctor", silent).stdout
    assert person.status(silent)["health"] == "unknown" and "unknown" not in person.run("status", silent).stdout
    assert "nothing can be drawn" in person.run("compare", silent, "--plot", "none.png", code=1).stderr
    person.run("report", silent, "-o", "silent.html")
    text = (person.at / "silent.html").read_text()
    assert "Nothing can be seen of its learning" in text and "waiting for its first start" in text and "true</code>" in text


def test_the_curves_of_several_jobs_as_a_picture(person: Person, tmp_path: Path) -> None:
    first, second = (by_hand(person, f"phase3-by-hand-{n}", run(100, every=20)) for n in (1, 2))
    said = person.run("compare", first.name, second.name, "--plot", "both.png")
    assert "phase3-by-hand-2" in said.stdout
    with Image.open(person.at / "both.png") as picture:
        colours = {colour for _, colour in picture.convert("RGB").getcolors(1 << 24)}
        assert picture.width == 1200 and picture.height > 700 and {(31, 119, 180), (214, 90, 20)} <= colours
    with pytest.raises(Failed, match="cannot write"):
        png(tmp_path / "no" / "where.png", {"loss": {"a": CURVE}})


_TRAINER = """\
import json, os, pathlib, sys

settings = dict(line.strip().split(": ", 1) for line in open(sys.argv[1]) if ": " in line)
run, number = pathlib.Path(os.environ["LAUNCH_RUN_DIR"]), int(os.environ["LAUNCH_ATTEMPT"])
if os.environ["LAUNCH_RESUME"]:
    sys.exit("step 120 is the last already: there is nothing left to train")
thrown = float(settings["lr"]) > 0.01
with open(run / "attempts" / f"{number:03d}" / "metrics.jsonl", "w") as file:
    for step in range(1, 121):
        norm = 0.0 if thrown and step > 9 else 31.0 if thrown and step == 7 else 0.5
        print(json.dumps({"t": 1e9 + step, "step": step, "total": 120, "applied": step, "loss": 1 / step,
                          "lr": float(settings["lr"]) * min(step / float(settings["warmup"]), 1 - step / 120),
                          "grad_norm": norm}), file=file, flush=True)
checkpoint = pathlib.Path(os.environ["LAUNCH_CHECKPOINT_DIR"]) / f"step-00000120-a{number:03d}"
checkpoint.mkdir(parents=True)
(checkpoint / "manifest.json").write_text(json.dumps({"version": VERSION, "job": os.environ["LAUNCH_JOB_ID"],
    "attempt": number, "step": 120, "resumed_from": None, "files": {}}))
assert int(settings["warmup"]) < 120
"""


def test_the_printed_fix_of_a_run_that_ended_is_given_as_it_stands_and_helps(person: Person) -> None:
    """A rate of 1 threw the weights away, and the run completed: going on from its checkpoint has no sense."""
    (person.at / "thrown.py").write_text(_TRAINER.replace("VERSION", str(MANIFEST_VERSION)))
    (person.at / "configs/stages/thrown.yaml").write_text(
        "about: a trainer\npython: thrown.py\ndefault_config: hot\nresume: launch\nresources: {gpus: 0}\nrestart: {max_restarts: 0}\n")
    (person.at / "configs/runs/thrown").mkdir()
    (person.at / "configs/runs/thrown/hot.yaml").write_text("optimizer:\n  lr: 1.0\n  warmup: 5\nmax_steps: 120\n")
    job = person.submit("thrown")
    person.run("wait", job)
    found = json.loads(person.run("doctor", job, "--json", code=1).stdout)
    [finding] = found["findings"]
    sets = ["--set", "optimizer.lr=0.001", "--set", "optimizer.warmup=12"]
    assert finding["rule"] == "no-gradient" and "learning rate that is too high (1)" in finding["cause"]
    assert finding["fix"] == shlex.join(["launch", "restart", job, "--resume", "never", *sets])
    refused = person.run("restart", job, *sets, code=4).stderr
    assert "nothing is left to do from its last checkpoint on" in refused and finding["fix"] in refused
    done = person.run(*shlex.split(finding["fix"])[1:])
    assert "optimizer.warmup: 5 -> 12" in done.stderr and "from the start" in done.stderr
    person.run("wait", job)
    status = person.status(job)
    assert (status["attempt"], status["state"], status["health"]) == (1, "COMPLETED", "ok")


def test_a_job_that_failed_is_not_called_well() -> None:
    """Its state says how it ended; of its learning there is nothing to say."""
    failed = Diagnosis(replace(JOB, state="FAILED"), "unknown", "its metrics", [], {}, None, [], {}, [])
    head = as_text(failed, 60).splitlines()[0]
    assert "FAILED" in head and not head.endswith(("ok", "unknown"))


def test_a_curve_goes_on_to_the_jobs_last_step_and_stands_beside_its_level() -> None:
    lines = terminal("loss", CURVE[:40], 48, 5, (40, 120), until=120).splitlines()
    assert lines[-1].split() == ["1", "step", "120"] and len(lines[-2].strip()) > 20
    flat = [[step, 2.77, 2.7726 + 0.002 * (step % 5), 2.78] for step in range(1, 400)]
    chance = terminal("loss", flat, 60, 7, level=math.log(16)).splitlines()
    assert chance[0] == "loss; dotted: 2.773" and float(chance[1].split()[0]) > 3 and float(chance[7].split()[0]) <= 2.5
    assert sum(any(char not in " ┤" for char in line.partition("┤")[2]) for line in chance[1:8]) <= 2  # a line, no noise
