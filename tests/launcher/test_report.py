"""`launch report`: one page that needs nothing else, for the eye and for the keyboard."""
from __future__ import annotations

import io
import json
import re
import time
from dataclasses import replace
from pathlib import Path

import pytest
from PIL import Image

from cluster.node.curves import curves
from launcher.api import Details
from launcher.doctor import Diagnosis
from launcher.plots import Scale, distinct, svg
from launcher.report import POINTS, Picture, Report, choose
from launcher.report_page import grouped, page
from tests.browser import browser
from tests.launcher.conftest import Person
from tests.launcher.test_views import JOB
from tests.node.test_rules import skipping

FINDING = {"rule": "updates-skipped", "severity": "warning", "what": "75 % of updates applied <b>", "why": "time", "cause": "lr",
           "fix": "launch restart mouse --set a.lr=1e-5", "first": 40, "last": 90, "page": "docs/doctor.md#updates-skipped"}


def png(width: int = 60, height: int = 40, colour: tuple[int, int, int] = (200, 120, 60)) -> bytes:
    raw = io.BytesIO()
    Image.new("RGB", (width, height), colour).save(raw, "PNG")
    return raw.getvalue()


def report(steps: int = 400, **facts: object) -> Report:
    lines = skipping(0.25, steps)
    status = replace(JOB, id="phase3-7kq2x9", name="생쥐 <script>", state="FAILED", reason="disk full", detail="it's full & over")
    found = Diagnosis(status, "warning", "its metrics", [FINDING], curves(lines, POINTS), None, [200],
                      {"wall": 1000.0, "useful": 700.0, "evaluation": 200.0, "queue": 100.0}, [])
    attempt = {"n": 0, "started_at": 1.0, "ended_at": 9.0, "reason": "disk full", "detail": "x", "resume_step": None, "step": 9,
               "checkpoint_step": None, "resume": None, "gpus": [], "env": {"hostname": "gpu05", "torch": "2.13", "python": "3.11"}}
    spec = {"argv": ["jobs.phase3"], "submitted_by": "me@here", "env": {"TOKEN": "hush"}}
    details = Details(status, spec, "training:\n  dataset: /data/mouse\n", [attempt], [], [], 0,
                      {"git_sha": "abc", "dirty": True, "patch": "diff --git a/x b/x\n@@\n+1\n"}, [])
    return Report(replace(found, **facts), details, [Picture("artifacts/turntable.png", "image/png", png())], ["big.mp4 (9 MB)"])


def test_the_page_needs_nothing_but_itself_and_keeps_to_its_words() -> None:
    text = page(report())
    assert re.findall(r'(?:src|href)="(?!data:|#)[^"]*"', text) == [] and "http://" not in text.replace("http://www.w3.org/2000/svg", "")
    assert "<script>" not in text.split("<h1>")[1].split("</h1>")[0] and "생쥐 &lt;script&gt;" in text
    for words in ("75 % of updates applied &lt;b&gt;", "launch restart mouse --set a.lr=1e-5", "disk full: it&#x27;s full &amp; over",
                  "gpu05", "/data/mouse", "abc with uncommitted changes", "big.mp4 (9 MB)", "70.0 %", "data:image/png;base64,"):
        assert words in text, words
    assert "hush" not in text  # values of the environment may be secrets


def test_a_run_of_thirty_thousand_steps_is_a_small_page_and_quickly_made() -> None:
    found = report(30_000)
    began = time.process_time()
    text = page(found)
    assert len(text.encode()) < 2_000_000 and time.process_time() - began < 1.0


def test_what_belongs_together_is_drawn_together() -> None:
    keys = ["lr", "loss", "epoch", "val/psnr", "val/psnr_mean", "psnr", "val/loss", "voice_std", "val/objects"]
    assert grouped(keys) == {"loss": ["loss", "val/loss"], "psnr": ["psnr", "val/psnr", "val/psnr_mean"],
                             "voice_std": ["voice_std"], "lr": ["lr"]}


@pytest.mark.parametrize("values", [[0.0, 1e-4], [5.0, 5.0], [-3.0, 2.0], [1e-3, 10.0], [0.0, 0.0]])
def test_every_scale_has_a_few_round_numbers(values: list[float]) -> None:
    scale = Scale(0, 100, values, "loss")
    ticks = scale.ticks()
    assert 2 <= len(ticks) <= 7 and all(0 <= scale.y(tick) <= 220 for tick in ticks)


def test_a_drawing_goes_on_to_the_last_step_beside_the_level_of_chance() -> None:
    flat = [[step, 2.77, 2.7726 + 0.002 * (step % 5), 2.78] for step in range(1, 40)]
    drawn = svg("loss", {"loss": flat}, [(40, 120)], until=120, level=2.7726)
    assert "step 120" in drawn and 'class="level"' in drawn and "chance: 2.773" in drawn
    width = float(re.search(r'class="mark" x="[\d.]+" y="\d+" width="([\d.]+)"', drawn)[1])
    assert width > 300
    ticks = re.findall(r'text-anchor="end">([\d.]+)</text>', drawn)
    assert len(set(ticks)) == len(ticks) >= 3
    assert distinct([2.766, 2.768, 2.77]) == ["2.766", "2.768", "2.77"]


def test_pictures_are_chosen_until_the_page_is_full() -> None:
    there = [["artifacts/film.mp4", 1_900_000], ["artifacts/huge.gif", 9_000_000], ["artifacts/a.ply", 5],
             *([f"attempts/000/validation/step-{n:08d}.png", 500_000] for n in range(0, 1000, 50))]
    chosen, left_out = choose(there, "mouse")
    assert [path for path, _ in chosen] == ["artifacts/film.mp4", "attempts/000/validation/step-00000950.png",
                                            "attempts/000/validation/step-00000750.png"]
    assert left_out[0] == "artifacts/huge.gif (9.0 MB): launch pull mouse artifacts/huge.gif"
    assert choose([], "mouse") == ([], [])


def by_hand(person: Person, name: str, lines: list[dict]) -> Path:
    """A run that somebody started without launch, and that launch has found."""
    directory = Path(person.env["LAUNCH_WORKDIR"]) / "runs" / name
    attempt = directory / "attempts/000"
    (attempt / "validation").mkdir(parents=True)
    late = time.time() - lines[-1]["t"]  # the last line is of just now
    (attempt / "metrics.jsonl").write_text("".join(json.dumps(line | {"t": line["t"] + late}) + "\n" for line in lines))
    (attempt / "validation/step-00000400.png").write_bytes(png())
    person.run("status", "--rescan")
    return directory


def test_a_report_of_a_run_as_a_person_gets_it(person: Person) -> None:
    by_hand(person, "phase3-by-hand-1", [{"t": 99.0, "step": 0, "total": 400, "event": "resumed"}, *skipping(0.6)])
    assert person.run("report", "phase3-by-hand-1").stdout == "phase3-by-hand-1.html\n"
    text = (person.at / "phase3-by-hand-1.html").read_text()
    assert "40 % of updates applied" in text and 'alt="evaluation at step 400"' in text and "steps that count" in text
    assert "no directory 'no'" in person.run("report", "phase3-by-hand-1", "-o", "no/where.html", code=2).stderr


@pytest.mark.campaign
def test_the_page_in_a_browser(tmp_path: Path) -> None:
    """Light and dark, loaded within a second, nothing asked of the network, read off with the keyboard alone."""
    path = tmp_path / "report.html"
    path.write_text(page(report(30_000)), encoding="utf-8")
    with browser(tmp_path / "profile") as tab:
        tab.open(path)
        seconds = min(tab.open(path) for _ in range(3))
        assert seconds < 1.0, seconds
        tab.screenshot(tmp_path / "light.png")
        reached = []
        for _ in range(40):
            tab.press("Tab")
            reached.append(tab.run("document.activeElement.tagName + ' ' + (document.activeElement.innerText || '').slice(0, 20)"))
            if reached[-1].startswith("FIGURE"):
                break
        assert reached[0] == "A To the findings" and reached[-1].startswith("FIGURE loss"), reached
        tab.press("Home")
        first = tab.run("document.activeElement.querySelector('output').textContent")
        tab.press("ArrowRight")
        second = tab.run("document.activeElement.querySelector('output').textContent")
        assert first.startswith("step 60 ") and second.startswith("step 120 ") and first.split()[-1] != second.split()[-1]
        assert tab.run("document.documentElement.scrollWidth") <= 1280
        tab.open(path, dark=True)
        tab.screenshot(tmp_path / "dark.png")
        tab.open(path, width=390)
        assert tab.run("document.documentElement.scrollWidth") <= 390
        assert {url.split(":")[0] for url in tab.requests} <= {"file", "data"} and tab.errors == []
    light, dark = (Image.open(tmp_path / name).convert("RGB") for name in ("light.png", "dark.png"))
    assert light.size[0] == 1280 and light.size[1] > 1500
    assert sum(light.getpixel((3, 3))) > 700 and sum(dark.getpixel((3, 3))) < 120
    for picture in (light, dark):
        colours = {colour for _, colour in picture.getcolors(1 << 24)}
        assert len(colours) > 200 and (200, 120, 60) in colours  # the drawings, and the picture that it made
