"""The stages as they are, or with one piece broken as it breaks in life (FAULT names it); imported once for all forked
ranks."""
from __future__ import annotations

import os
import sys
from typing import Any

import jobs.clap_made  # noqa: F401
import jobs.face_voice_stage  # noqa: F401
import jobs.features  # noqa: F401
import jobs.gslrm_stage  # noqa: F401
import jobs.mv_stage  # noqa: F401
import jobs.mv_validation  # noqa: F401
import jobs.trainer  # noqa: F401
import torch
from jobs import clap1, clap_stage, face_voice, phase1, phase3
from jobs.data.multiview import ViewChoice
from models.audio_attention import AudioAttention

_STAGES = {"clap1": clap1, "face_voice": face_voice, "phase1": phase1, "phase3": phase3}


def main() -> None:
    """STAGE CONFIG …"""
    if (fault := os.environ.get("FAULT", "NONE")) != "NONE":
        _BROKEN[fault]()
    _STAGES[sys.argv.pop(1)].main()


def _gates_shut() -> None:
    """Every gate is 0 and no one trains it: what lies behind it gets no gradient."""
    whole = AudioAttention.__init__

    def shut(self: AudioAttention, *given: Any, **named: Any) -> None:
        whole(self, *given, **named)
        torch.nn.init.zeros_(self.gate)

    AudioAttention.__init__ = shut  # type: ignore[method-assign]
    clap_stage.TRAINED["clap1"] = (clap_stage.PROJECTOR, "processor.to_")


def _compares_inputs() -> None:
    """The views that were put in are the only ones that are looked at."""
    whole = ViewChoice.choose
    ViewChoice.choose = lambda self, *given: whole(self, *given)[:self.inputs]  # type: ignore[method-assign]


_BROKEN = {"gates shut": _gates_shut, "compares inputs": _compares_inputs}
