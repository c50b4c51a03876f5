from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest

from jobs.metrics import Metrics, Wandb, append_line, duration
from jobs.runtime import WriteFailed


def test_values_that_json_lacks_become_words(tmp_path: Path) -> None:
    append_line(tmp_path / "m", {"a": math.nan, "b": math.inf, "c": -math.inf, "d": 0.5, "e": "x"})
    assert json.loads((tmp_path / "m").read_text()) == {"a": "nan", "b": "inf", "c": "-inf", "d": 0.5, "e": "x"}


def test_only_the_rank_that_opened_it_writes_and_speaks(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    silent, speaking = Metrics(5), Metrics(5)
    speaking.open(tmp_path / "metrics.jsonl")
    for metrics in (silent, speaking):
        metrics.write(3, "eval", loss=1.0)
        metrics.say("hello")
    lines = [json.loads(line) for line in (tmp_path / "metrics.jsonl").read_text().splitlines()]
    assert [(line["step"], line["total"], line["event"], line["loss"]) for line in lines] == [(3, 5, "eval", 1.0)]
    assert capsys.readouterr().out == "hello\n"


def test_a_place_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    with pytest.raises(WriteFailed, match="cannot write .*gone.*No such file"):
        append_line(tmp_path / "gone" / "metrics.jsonl", {})


def test_durations_are_short() -> None:
    assert [duration(s) for s in (5.4, 75, 4000)] == ["5s", "1m15s", "1h06m"]


def test_wandb_keeps_the_jobs_id_and_goes_offline_without_a_key(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls: list = []
    run = SimpleNamespace(define_metric=lambda *a, **k: None, log=calls.append, finish=lambda: calls.append("end"))

    def init(**given: object) -> SimpleNamespace:
        calls.append(given)
        return run

    fake = SimpleNamespace(init=init, Error=RuntimeError, Settings=lambda **k: None, Image=lambda picture: picture.shape)
    monkeypatch.setitem(sys.modules, "wandb", fake)
    sent = Wandb("online", "launch", "phase3-abc", tmp_path, {})
    sent.scalars(4, {"loss": 0.5, "reason": "words"})
    sent.image(4, "val/picture", np.zeros((2, 3, 3), np.uint8))
    sent.close()
    assert (calls[0]["id"], calls[0]["resume"], calls[0]["mode"]) == ("phase3-abc", "allow", "offline")
    assert calls[1:] == [{"step": 4, "loss": 0.5}, {"step": 4, "val/picture": (2, 3, 3)}, "end"]
    assert "no WANDB_API_KEY" in capsys.readouterr().err
