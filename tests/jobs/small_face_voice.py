"""Face-voice matching at its smallest, and its imports done once for all forked ranks."""
from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import jobs.data.seen_heard  # noqa: F401
import jobs.face_voice_stage  # noqa: F401
import jobs.features  # noqa: F401
import jobs.trainer  # noqa: F401
from jobs.face_voice import main

__all__ = ["config_of", "main", "tower_folders"]


def config_of(data: Path, freeze: str = "none", dropout: float = 0.1, **training: Any) -> dict[str, Any]:
    """A run of 8 steps on the procedural people in `data`: seconds."""
    return {
        "data": {"voxceleb": str(data), "genders": str(data / "genders.tsv"),
                 "split": {"val": 0.2, "test": 0.2, "seen": 0.3}},
        "model": {"face": {"kind": "tiny", "size": 16, "width": 16}, "voice": {"kind": "tiny", "width": 16},
                  "freeze": freeze, "width": 16, "dropout": dropout},
        "training": {
            "max_steps": 8, "batch": 8, "precision": "fp32", "loader_workers": 0,
            "clips": {"train_s": 0.3, "eval_s": 0.6, "min_s": 0.1}, "optimizer": {"towers_lr": 1e-3},
            "schedule": {"warmup": 2}, "validation": {"every_steps": 4, "trials": 100}, **training},
        "evaluation": {"trials": 300, "bootstrap": 20},
        "checkpoint": {"every_steps": 4, "keep_last": 4}}


def tower_folders(out: Path, width: int, layers: int, size: int, face: dict[str, Any], voice: dict[str, Any]) -> None:
    """vit and w2v below `out`: random weights as transformers keeps them, with these preprocessor_config.json."""
    import torch
    import transformers

    transformers.utils.logging.disable_progress_bar()  # its monitor is a thread that outlives the test
    sizes = {"hidden_size": width, "num_hidden_layers": layers, "num_attention_heads": 2, "intermediate_size": 2 * width}
    torch.manual_seed(0)
    transformers.ViTModel(transformers.ViTConfig(**sizes, image_size=size, patch_size=8)).save_pretrained(out / "vit")
    transformers.Wav2Vec2Model(transformers.Wav2Vec2Config(
        **sizes, conv_dim=(width // 2,) * 7, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4,
    )).save_pretrained(out / "w2v")
    for name, said in (("vit", face), ("w2v", voice)):
        (out / name / "preprocessor_config.json").write_text(json.dumps(said))
