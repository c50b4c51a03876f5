"""The towers that a run file names: from a transformers folder, from random weights, or tiny; never from the hub.

How a picture or a sound is normalised is the encoder's: it is read from the folder's preprocessor_config.json, and it
goes into the checkpoint with the sizes.
"""
from __future__ import annotations

import hashlib
import json
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from safetensors import SafetensorError

from configs.face_voice import FaceTower, Model, VoiceTower
from jobs.data.seen_heard import FaceForm, VoiceForm
from jobs.runtime import JobError
from jobs.world import mixed_seed
from models.towers import SpeechTower, TinyFace, TinyVoice, Tower, ViTTower, without_chance
from models.weights import from_folder

if TYPE_CHECKING:
    from transformers import PreTrainedModel

_PREPROCESSOR = "preprocessor_config.json"
_RANDOM = "random:"
_RATE = 16_000  # Hz, of every public wav2vec2 and WavLM
_CLASSES = {"vit": ("ViTModel", "ViTConfig"), "wav2vec2": ("Wav2Vec2Model", "Wav2Vec2Config"),
            "wavlm": ("WavLMModel", "WavLMConfig")}


@dataclass(frozen=True)
class Built:
    """A tower and what it takes. `about` rebuilds it without its weights."""

    tower: Tower
    form: FaceForm | VoiceForm
    about: dict[str, Any]
    pretrained: bool


def build_face(config: FaceTower, seed: int) -> Built:
    """Raises JobError."""
    if config.kind == "tiny":
        return _tiny_face({"kind": "tiny", "width": config.width, "form": asdict(FaceForm(config.size))}, seed)
    net, pretrained = _net(config.kind, str(config.path), "model.face.path", add_pooling_layer=False)
    if not pretrained:
        form = FaceForm(net.config.image_size)
    else:
        said = _preprocessor(Path(str(config.path)), "image_mean", "image_std")
        form = FaceForm(net.config.image_size, tuple(said["image_mean"]), tuple(said["image_std"]))
    return Built(ViTTower(net), form, _about(config.kind, net, form), pretrained)


def build_voice(config: VoiceTower, seed: int) -> Built:
    """Raises JobError."""
    if config.kind == "tiny":
        form = asdict(VoiceForm(config.rate))
        return _tiny_voice({"kind": "tiny", "width": config.width, "form": form}, seed)
    net, pretrained = _net(config.kind, str(config.path), "model.voice.path")
    if not pretrained:
        form = VoiceForm(_RATE)
    else:
        said = _preprocessor(Path(str(config.path)), "sampling_rate", "do_normalize")
        form = VoiceForm(said["sampling_rate"], said["do_normalize"])
    return Built(SpeechTower(net), form, _about(config.kind, net, form), pretrained)


def rebuild(about: dict[str, Any]) -> Built:
    """The architecture alone, from what a checkpoint says; its weights are the checkpoint's."""
    kind = about["kind"]
    if kind == "tiny":
        return _tiny_face(about, 0) if "size" in about["form"] else _tiny_voice(about, 0)
    cls, config_cls = _classes(kind)
    config = config_cls.from_dict(about["config"])
    if kind == "vit":
        return Built(ViTTower(cls(config, add_pooling_layer=False)), face_form(about["form"]), about, False)
    return Built(SpeechTower(cls(config)), VoiceForm(**about["form"]), about, False)


def face_form(said: dict[str, Any]) -> FaceForm:
    return FaceForm(said["size"], tuple(said["mean"]), tuple(said["std"]))


def freeze(built: Built, model: Model, which: str) -> None:
    """Raises JobError."""
    try:
        built.tower.freeze(model.freeze, model.top_k)
    except ValueError as error:
        raise JobError(f"model.{error} ({which})", "lower model.top_k") from None


def digest_of(tower: Tower) -> str:
    """Of the names and values of all weights."""
    digest = hashlib.sha256()
    for name, tensor in sorted(tower.state_dict().items()):
        digest.update(name.encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()[:16]


def _tiny_face(about: dict[str, Any], seed: int) -> Built:
    torch.manual_seed(mixed_seed("face tower", seed))
    return Built(TinyFace(about["width"]), face_form(about["form"]), about, False)


def _tiny_voice(about: dict[str, Any], seed: int) -> Built:
    torch.manual_seed(mixed_seed("voice tower", seed))
    form = VoiceForm(**about["form"])
    return Built(TinyVoice(about["width"], form.rate), form, about, False)


def _about(kind: str, net: PreTrainedModel, form: FaceForm | VoiceForm) -> dict[str, Any]:
    return {"kind": kind, "config": net.config.to_diff_dict(), "form": asdict(form)}


def _classes(kind: str) -> tuple[Any, Any]:
    import transformers  # seconds, and the tiny towers need none of it

    model, config = _CLASSES[kind]
    return getattr(transformers, model), getattr(transformers, config)


def _net(kind: str, path: str, key: str, **options: Any) -> tuple[PreTrainedModel, bool]:
    """The network, and whether its weights were learned. Raises JobError."""
    cls, config_cls = _classes(kind)
    if path.startswith(_RANDOM):
        torch.manual_seed(mixed_seed(kind, path))
        return cls(without_chance(config_cls()), **options), False
    folder = Path(path)
    try:
        found = json.loads((folder / "config.json").read_bytes()).get("model_type")
    except (OSError, ValueError) as error:
        raise JobError(f"{key}: {folder} is no folder of transformers with a config.json: {error}",
                       f"name the folder of a {kind}, as `save_pretrained` writes it") from None
    if found != kind:
        raise JobError(f"{key}: {folder} holds a {found}, the run file says {kind}", "change `kind` or `path`")
    try:
        config = without_chance(config_cls.from_pretrained(folder, local_files_only=True))
        net, info = from_folder(cls, folder, config=config, dtype=torch.float32, output_loading_info=True, **options)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        raise JobError(f"{key}: the weights in {folder} cannot be read: {error}", "download or copy them again"
                       ) from None
    lacking = sorted(info["missing_keys"]) + [str(one[0]) for one in info["mismatched_keys"]]
    if lacking:
        raise JobError(f"{key}: {folder} lacks {len(lacking)} weights of its {kind}: {', '.join(lacking[:5])}",
                       "they would be random ones; name a complete folder")
    return net, True


def _preprocessor(folder: Path, *keys: str) -> dict[str, Any]:
    """Raises JobError: constants are not guessed."""
    try:
        said = json.loads((folder / _PREPROCESSOR).read_bytes())
    except (OSError, ValueError) as error:
        raise JobError(f"{folder / _PREPROCESSOR}: cannot be read: {error}",
                       "it says how this encoder's input is normalised, and comes with the weights") from None
    if missing := [key for key in keys if key not in said]:
        raise JobError(f"{folder / _PREPROCESSOR}: says nothing of {' and '.join(missing)}",
                       "it says how this encoder's input is normalised; take the one that comes with the weights")
    return said
