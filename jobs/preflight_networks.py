"""The networks of each stage on torch's meta device, and what of its weights does not fit them.

The stages' own code builds them and reads the files: there nothing has values, and of the files only headers are read
(models.weights). So it takes seconds at any size, and says what the start would say.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

import msgspec
import torch
from safetensors import SafetensorError
from torch import Tensor, nn

from jobs.checkpoint import check_module, weights_of
from jobs.made_with import Differs, differing
from jobs.optimizer import fresh_moments
from jobs.preflight_data import drawn
from jobs.preflight_env import Found
from jobs.runtime import JobError
from jobs.start import find_list, find_path, with_found
from models.cameras import Rig
from models.weights import WeightsError, read_safetensors, read_weights

_MODEL_FIX = "name weights of this model, or change `model:` to theirs"
T = TypeVar("T")


@dataclass(frozen=True)
class Networks:
    """Of a run, on the meta device. `modules` and `files` as of a Stage; `trains`: the modules whose parameters with a
    gradient are trained; `frozen`: what else has to be in memory, at so many bytes a weight."""

    modules: dict[str, nn.Module] = field(default_factory=dict)
    trains: tuple[str, ...] = ()
    files: dict[str, str] = field(default_factory=dict)
    frozen: tuple[nn.Module, ...] = ()
    frozen_bytes: int = 4
    activations_gb: float = 0.0  # at least; 0: nobody can say

    @property
    def trained(self) -> dict[str, nn.Parameter]:
        return {f"{module}.{name}": parameter for module in self.trains
                for name, parameter in self.modules[module].named_parameters() if parameter.requires_grad}

    def tensors(self) -> dict[str, dict[str, Tensor]]:
        """All that a checkpoint holds."""
        moments = {f"{name}.{key}": value for name, parameter in self.trained.items()
                   for key, value in fresh_moments(parameter).items()}
        return {**weights_of(self.modules, self.files), "optimizer": moments}


@dataclass
class Looked:
    found: list[Found] = field(default_factory=list)
    networks: Networks | None = None

    def sure(self, key: str, look: Callable[[], T], differs: Callable[[], Differs | None] = lambda: None,
             check: str = "checkpoint") -> T | None:
        """What `look` gives; what it raises is a finding. `differs` knows which keys, or says nothing."""
        try:
            return look()
        except (JobError, ValueError) as error:  # WeightsError, UNetError and PipelineError are of the second kind
            what, hint = (error.what, error.hint) if isinstance(error, JobError) else (str(error), None)
            fix = hint or _MODEL_FIX
            if other := differs():
                what, fix = f"{other.what}: {other.fix}\n  {what}", other.fix
            self.found.append(Found(check, "error", what, key, "the job would end before its first step", fix))
        return None


def rigs_seen(run: Any) -> dict[str, Rig]:
    """Of the training samples that are looked at, by fingerprint; none: they cannot be read, which is told there."""
    from jobs.data.rigs import rigs_of
    from jobs.data.samples import read_list, read_sample

    try:
        listed = read_list(Path(find_list(run.training.dataset.path, "data_train.txt")))[0]
        return rigs_of([read_sample(name, directory) for name, directory in drawn(listed)])
    except JobError:
        return {}


# --- stages -------------------------------------------------------------------------------------------------

def _phase3(run: Any, resume: Path | None, looked: Looked) -> Networks | None:
    from jobs.gslrm_stage import PictureLoss, activations
    from jobs.reconstructor import network

    with torch.device("meta"):
        model = looked.sure("model", lambda: network(run.model), check="config")
        looked.sure("training.losses", lambda: PictureLoss(_with_losses(run), torch.device("meta")))
        if model is None:
            return None
        if run.init_from and not resume:
            path = Path(str(find_path(run.init_from)))
            looked.sure("init_from", lambda: _check_gslrm(model, path), lambda: _gslrm_sizes(run.model, path))
    need, asked = activations(run, model), run.training.activation_checkpointing
    least = min(need.values()) if asked == "auto" else need[asked]
    return Networks({"gslrm": model}, ("gslrm",), activations_gb=least)


def _with_losses(run: Any) -> Any:
    losses = with_found(run.training.losses, "lpips_weights", "lpips_heads", "perceptual_weights")
    return msgspec.structs.replace(run, training=msgspec.structs.replace(run.training, losses=losses))


def _check_gslrm(model: nn.Module, path: Path) -> None:
    if path.is_dir():
        check_module(path, "gslrm", model)
    else:
        model.load_upstream(path)


def _gslrm_sizes(model: Any, path: Path, key: str = "model") -> Differs | None:
    """Which key of `model:` is another one in the weights, by their names and shapes."""
    try:
        named = read_safetensors(path / "model.safetensors") if path.is_dir() else read_weights(path)
    except (OSError, SafetensorError, WeightsError):
        return None
    named = {name.removeprefix("gslrm."): tensor for name, tensor in named.items()}
    embedder, layers = named.get("patch_embedder.1.weight"), [
        int(name.split(".")[1]) for name in named if name.startswith("transformer_layers.")]
    there = {"n_layer": max(layers) + 1} if layers else {}
    if embedder is not None and embedder.dim() == 2:
        there |= {"d": embedder.shape[0], "patch_size": int((embedder.shape[1] / 9) ** 0.5)}
    return differing({f"{key}.{name}": (getattr(model, name), value) for name, value in there.items()})


def _phase1(run: Any, resume: Path | None, looked: Looked) -> Networks | None:
    from jobs.data.prompts import check_embeddings
    from jobs.mv_components import PROMPTS, check_together, read_prompts
    from jobs.mv_stage import MVStage
    from models.mv_unet import load_unet
    from models.mvdiffusion import EMA, UNET, load_frozen

    _lpips(run.training.validation, looked)
    rig = next(iter(rigs_seen(run).values()), None)
    if resume is None and run.pretrained.startswith("random:"):  # tiny, and made here
        if run.prompt_embeds and rig is not None:
            looked.sure("prompt_embeds", lambda: check_embeddings(
                read_prompts(Path(str(find_path(run.prompt_embeds)))), len(rig.names),
                run.model.tiny.unet.cross_attention_dim, "prompt_embeds"), check="rig")
        return None
    key, folder = ("resume", resume) if resume else ("pretrained", Path(str(find_path(run.pretrained))))
    name = EMA if resume is None and (folder / EMA).is_dir() else UNET
    with torch.device("meta"):
        unet = looked.sure(key, lambda: load_unet(folder / name, None if resume else run.model.attention))
        frozen = looked.sure(key, lambda: load_frozen(folder)) or {}
    if unet is not None and rig is not None:
        given = find_path(run.prompt_embeds) if resume is None else None
        path = Path(given or folder / PROMPTS)
        looked.sure("prompt_embeds", lambda: check_together(unet, read_prompts(path), rig, path), check="rig")
    if unet is None:
        return None
    parts = tuple(part for part in frozen.values() if isinstance(part, nn.Module))
    return Networks({UNET: unet, EMA: unet}, (UNET,), MVStage.files, parts)


def _lpips(validation: Any, looked: Looked) -> None:
    from models.perceptual import Lpips

    files = [str(find_path(path)) for path in (validation.lpips_weights, validation.lpips_heads) if path]
    if files:
        with torch.device("meta"):
            looked.sure("training.validation", lambda: Lpips(*files))


def _clap(run: Any, resume: Path | None, looked: Looked) -> Networks | None:
    """Of a checkpoint: to resume, of the stage before, or to be looked at."""
    from jobs.clap_components import BASE, CLAP, about_in

    key = "resume" if resume else "init_from" if hasattr(run, "init_from") else "checkpoint"
    folder = resume or Path(str(find_path(getattr(run, key))))
    about = looked.sure(key, lambda: about_in(folder))
    if about is None:
        return None
    base = _named(run.base_model) or about.base or str(folder / BASE)
    clap = _named(run.clap_model) or about.clap or str(folder / CLAP)
    found = _clap_networks(base, clap, lambda frozen: _clap_assembled(frozen, about, folder), looked)
    for name, module in found.modules.items() if found and resume is None else ():
        looked.sure(key, lambda name=name, module=module: check_module(folder, name, module))
    return found


def _clap_evaluate(run: Any, resume: Path | None, looked: Looked) -> Networks | None:
    from transformers import CLIPModel

    from jobs.clap_components import read_part

    if run.image_encoder:
        with torch.device("meta"):
            looked.sure("image_encoder", lambda: read_part(CLIPModel, Path(str(find_path(run.image_encoder))),
                                                           "image_encoder"))
    return _clap(run, resume, looked)


def _clap_assembled(frozen: Any, about: Any, folder: Path) -> tuple[nn.Module, nn.Module]:
    from jobs.clap_components import assemble
    from models.audio_attention import INITIAL_GATE

    loaded = assemble(frozen, about, INITIAL_GATE, folder)
    return loaded.projector, loaded.parts


def _clap_fresh(run: Any, looked: Looked) -> Networks | None:
    from models.clap2diffusion import AudioProjector, build_trained

    if run.base_model.startswith("random:"):
        return None  # tiny, and made here
    sizes = run.model
    return _clap_networks(str(find_path(run.base_model)), str(find_path(run.clap_model)), lambda frozen: (
        AudioProjector(frozen.clap.config.projection_dim, sizes.hidden, sizes.tokens,
                       frozen.unet.config.cross_attention_dim, sizes.dropout),
        build_trained(frozen.unet, sizes.gate, None)), looked)


def _clap_networks(base: str, clap: str, around: Callable[[Any], tuple[nn.Module, nn.Module]],
                   looked: Looked) -> Networks | None:
    """The frozen networks of two folders, and what `around` puts around them. None: one is to be downloaded."""
    from jobs.clap_caches import HUB
    from jobs.clap_components import PARTS, PROJECTOR, load_frozen

    if base.startswith(HUB) or clap.startswith(HUB):
        return None
    with torch.device("meta"):
        frozen = looked.sure("base_model, clap_model", lambda: load_frozen(Path(base), Path(clap)))
        made = None if frozen is None else looked.sure("base_model", lambda: around(frozen))
    if made is None:
        return None
    return Networks({PROJECTOR: made[0], PARTS: made[1]}, frozen=tuple(frozen.networks.values()))


def _named(path: str | None) -> str | None:
    return None if path is None or path.startswith("random:") else find_path(path)


def _clap_training(stage: str) -> Callable[[Any, Path | None, Looked], Networks | None]:
    def build(run: Any, resume: Path | None, looked: Looked) -> Networks | None:
        from jobs.clap_stage import TRAINED
        from models.audio_attention import set_trained
        from models.clap2diffusion import add_lora

        found = _clap_fresh(run, looked) if stage == "clap1" and resume is None else _clap(run, resume, looked)
        if found is None:
            return None
        unet = found.frozen[0]
        if stage == "clap2" and not hasattr(unet, "peft_config"):  # the stage before has none
            with torch.device("meta"):
                add_lora(unet, run.lora.rank, run.lora.alpha, run.lora.dropout)
        for module, owner in found.modules.items():
            set_trained(((f"{module}.{key}", value) for key, value in owner.named_parameters()), TRAINED[stage])
        return replace(found, trains=tuple(found.modules), frozen_bytes=2 if run.training.precision == "bf16" else 4)

    return build


def _face_voice(run: Any, resume: Path | None, looked: Looked) -> Networks | None:  # noqa: ARG001
    from jobs.towers import build_face, build_voice, freeze
    from models.face_voice import FaceVoice

    model, seed = with_towers(run.model), run.training.seed
    with torch.device("meta"):
        face = looked.sure("model.face.path", lambda: build_face(model.face, seed))
        voice = looked.sure("model.voice.path", lambda: build_voice(model.voice, seed))
        if face is None or voice is None:
            return None
        for which, one in (("model.face", face), ("model.voice", voice)):
            looked.sure("model.top_k", lambda one=one, which=which: freeze(one, model, which))
        heads = FaceVoice(face.tower.width, voice.tower.width, model.width, model.dropout, model.first_scale)
    towers = {"face": face.tower, "voice": voice.tower}
    if model.freeze == "all":
        return Networks({"heads": heads}, ("heads",), frozen=tuple(towers.values()))
    return Networks({"heads": heads, **towers}, ("heads", *towers))


def with_towers(model: Any) -> Any:
    return msgspec.structs.replace(model, face=with_found(model.face, "path"), voice=with_found(model.voice, "path"))


def _face_voice_eval(run: Any, resume: Path | None, looked: Looked) -> Networks | None:
    from configs.face_voice import Model
    from jobs.face_voice_stage import read_about
    from jobs.towers import build_face, build_voice, rebuild
    from models.face_voice import FaceVoice

    named = find_path(run.checkpoint) or resume
    about = looked.sure("checkpoint", lambda: read_about(Path(str(named)))) if named else None
    if about is None:
        return None
    model, folder = msgspec.convert(about["model"], Model), Path(str(named))
    frozen = bool(about["frozen towers"])
    with torch.device("meta"):
        face = looked.sure("checkpoint", lambda: build_face(model.face, 0) if frozen else rebuild(about["face"]))
        voice = looked.sure("checkpoint", lambda: build_voice(model.voice, 0) if frozen else rebuild(about["voice"]))
        if face is None or voice is None:
            return None
        heads = FaceVoice(face.tower.width, voice.tower.width, model.width, model.dropout)
    towers = {"face": face.tower, "voice": voice.tower}
    for name, module in {"heads": heads, **({} if frozen else towers)}.items():
        looked.sure("checkpoint", lambda name=name, module=module: check_module(folder, name, module))
    return Networks(frozen=(heads, *towers.values()))


def _generator(run: Any, resume: Path | None, looked: Looked) -> Networks | None:  # noqa: ARG001
    """Of phase 2, and of reconstruct with its reconstructor."""
    from jobs.mv_generator import load_pipeline, with_views

    config = with_found(run.generator, "checkpoint", "rig_of", "prompt_embeds")
    folder = Path(config.checkpoint)
    with torch.device("meta"):
        pipeline = looked.sure("generator.checkpoint", lambda: load_pipeline(folder, config))
    if pipeline is not None:
        looked.sure("generator", lambda: with_views(pipeline, folder, config, ""), check="rig")
    gslrm = _reconstructor(run, looked) if hasattr(run, "reconstructor") else None
    parts = (pipeline.unet, pipeline.vae, pipeline.image_encoder) if pipeline is not None else ()
    return Networks(frozen=(*parts, *([gslrm] if gslrm is not None else [])))


def _reconstructor(run: Any, looked: Looked) -> nn.Module | None:
    from jobs.reconstructor import network, sizes_of

    key, path = "reconstructor.checkpoint", Path(str(find_path(run.reconstructor.checkpoint)))
    sizes = run.reconstructor.model or looked.sure(key, lambda: sizes_of(path))
    if sizes is None:
        return None
    with torch.device("meta"):
        model = network(sizes)
        looked.sure(key, lambda: _check_gslrm(model, path),
                    lambda: _gslrm_sizes(sizes, path, "reconstructor.model"))
    return model


STAGES: dict[str, Callable[[Any, Path | None, Looked], Networks | None]] = {
    "phase1": _phase1, "phase2": _generator, "phase3": _phase3, "reconstruct": _generator,
    "face-voice": _face_voice, "face-voice-eval": _face_voice_eval,
    **{stage: _clap_training(stage) for stage in ("clap1", "clap2", "clap3")},
    "clap-evaluate": _clap_evaluate, "clap-generate": _clap}
