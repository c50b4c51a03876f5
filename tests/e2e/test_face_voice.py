"""Face-voice matching learns: the demo, as the documents say it, on people it has never met."""
from __future__ import annotations

import json
from pathlib import Path

import pytest

from tests.jobs.small_face_voice import tower_folders

from .lab import Lab

REPOSITORY = Path(__file__).parents[2]
LIMIT_S = 900


def numbers(run: Path, group: str) -> dict[tuple[str, str], dict]:
    content = json.loads((run / "artifacts/evaluation.json").read_text())
    return {(one["name"], one["way"]): one for part in content if part["group"] == group for one in part["numbers"]}


@pytest.mark.campaign
def test_the_demo(tmp_path: Path) -> None:
    here = Lab(REPOSITORY, tmp_path)
    log = here.launch("submit", "face-voice", "--config", "demo", "--follow", timeout_s=LIMIT_S).stdout
    (view,) = json.loads(here.launch("status", "--all", "--json").stdout)
    assert view["state"] == "COMPLETED" and view["step"] == 400 and here.findings("@last") == []
    print(f"face-voice demo: {view['ended_at'] - view['started_at']:.0f} s (wanted: 180)")
    found = numbers(Path(view["run_dir"]), "unseen-unheard")
    matched = [found["1:2", way] for way in ("voice->face", "face->voice")]
    print(f"unseen: 1:2 {[one['value'] for one in matched]}, EER {found['EER', '']['value']:.3f}")
    assert all(one["value"] >= 0.85 and one["low"] > one["chance"] == 0.5 for one in matched)
    assert found["EER", ""]["value"] <= 0.20 and found["EER", ""]["chance"] == 0.5
    assert "chance" in log and "ALARM" not in log
    here.launch("submit", "face-voice-eval", "--resume", "@last", "--follow", timeout_s=LIMIT_S)
    evaluated = max(json.loads(here.launch("status", "--all", "--json").stdout), key=lambda one: one["submitted_at"])
    assert evaluated["state"] == "COMPLETED" and evaluated["stage"] == "face-voice-eval"
    again = numbers(Path(evaluated["run_dir"]), "unseen-unheard")
    assert again["1:2", "voice->face"]["value"] == pytest.approx(matched[0]["value"], abs=1e-3)


@pytest.mark.campaign
def test_towers_that_are_frozen_at_random_are_told_from_the_loss(tmp_path: Path) -> None:
    """The defect of the public original: the heads alone cannot undo what random towers have thrown away."""
    tower_folders(tmp_path, 64, 2, 32, {"image_mean": [0.5] * 3, "image_std": [0.5] * 3},
                  {"sampling_rate": 16000, "do_normalize": True})
    here = Lab(REPOSITORY, tmp_path)
    sets = {"model.freeze": "all", "model.face.kind": "vit", "model.face.path": str(tmp_path / "vit"),
            "model.voice.kind": "wav2vec2", "model.voice.path": str(tmp_path / "w2v"), "training.max_steps": "200"}
    log = here.launch("submit", "face-voice", "--config", "demo", "--follow",
                      *(word for key, value in sets.items() for word in ("--set", f"{key}={value}")),
                      timeout_s=LIMIT_S).stdout
    assert "the loss stays at ln(batch) = 4.159, the loss of guessing" in log
