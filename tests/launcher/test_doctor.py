"""`launch doctor` and the health beside the state, as a person sees them."""
from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
from PIL import Image

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
