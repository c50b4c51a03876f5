"""`python -m jobs.data prompts CHECKPOINT OUT.pt --rig RIG`: the prompt embedding of each view of a rig.

Made from the rig's view names by the checkpoint's own tokenizer and text encoder, fp16 [views, tokens, width], as
the public `clr_embeds.pt`; beside it OUT.json says what they are of. The views of a rig are told apart by nothing
else than these, so two that are nearly equal are warned about.
"""
from __future__ import annotations

import argparse
import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from jobs.data.options import rig_named
from jobs.runtime import JobError
from models import rigs
from models.cameras import Rig

ALIKE = 0.98  # cosine of two views' embeddings from which they are hard to tell apart


def add(verbs: argparse._SubParsersAction) -> None:
    parser = verbs.add_parser("prompts", help="prompt embeddings from a rig's view names")
    parser.add_argument("checkpoint", type=Path, help="a diffusers folder with tokenizer/, text_encoder/ and unet/")
    parser.add_argument("out", type=Path, help="the file to write, such as clr_embeds.pt")
    parser.add_argument("--rig", default="mv6", help="mv6, orbit32, a data set or a sample (mv6)")
    parser.add_argument("--names", help="other names for its views, in order, separated by commas")
    parser.add_argument("--template", default=rigs.PROMPT, help=f"the prompt, with {{view}} ({rigs.PROMPT!r})")
    parser.add_argument("--json", action="store_true", help="the report for programs")
    parser.set_defaults(run=run)


def run(given: argparse.Namespace) -> int:
    """Raises JobError."""
    rig = rig_named(given.rig)
    texts = _texts(rig, given.names, given.template)
    width = unet_width(given.checkpoint)
    _check_encoder(given.checkpoint, width)
    embeds = embed(given.checkpoint, texts)
    check_embeddings(embeds, len(texts), width, "the text encoder's output")
    given.out.parent.mkdir(parents=True, exist_ok=True)
    torch.save(embeds, given.out)
    about = {"rig": rigs.to_record(rig), "prompts": texts, "checkpoint": str(given.checkpoint.resolve())}
    given.out.with_suffix(".json").write_text(json.dumps(about, indent=1))
    alike = alike_pairs(embeds)
    report = {"out": str(given.out), "shape": list(embeds.shape), "rig": rig.fingerprint, "prompts": texts,
              "cosines": cosines(embeds).tolist(), "alike": [[texts[a], texts[b], value] for a, b, value in alike]}
    print(json.dumps(report, indent=1) if given.json else _table(report, alike))
    return 0


def _texts(rig: Rig, names: str | None, template: str) -> list[str]:
    if names is not None:
        given = [name.strip() for name in names.split(",")]
        if len(given) != len(rig.names) or len(set(given)) != len(given) or "" in given:
            raise JobError(f"--names {names}: {len(set(given))} different names for a rig of {len(rig.names)} views",
                           f"give one name for each of {', '.join(rig.names)}")
        rig = Rig(tuple(given), rig.c2w, rig.fxfycxcy, rig.width, rig.height)
    try:
        return rigs.prompts(rig, template)
    except ValueError as error:
        raise JobError(f"--template: {error}") from None


def unet_width(checkpoint: Path) -> int:
    """The width of the UNet's cross-attention. Raises JobError."""
    width = _config(checkpoint, "unet").get("cross_attention_dim")
    if not isinstance(width, int):
        raise JobError(f"{checkpoint / 'unet/config.json'}: cross_attention_dim is {width!r}, not a number",
                       "name the folder of a Stable Diffusion 2.1 unCLIP or MVDiffusion checkpoint")
    return width


def _check_encoder(checkpoint: Path, width: int) -> None:
    """Before its weights are read. Raises JobError."""
    found = _config(checkpoint, "text_encoder").get("hidden_size")
    if found != width:
        raise JobError(f"{checkpoint / 'text_encoder'} makes embeddings {found} wide, the UNet's cross-attention takes "
                       f"{width}: {_whose(found)}",
                       "use the text encoder that the UNet was trained with, of the same checkpoint")


def _whose(width: Any) -> str:
    known = {768: "768 is CLIP ViT-L, the encoder of Stable Diffusion 1",
             1024: "1024 is OpenCLIP ViT-H, the encoder of Stable Diffusion 2"}
    return known.get(width, "this encoder belongs to another model")


def _config(checkpoint: Path, part: str) -> dict[str, Any]:
    path = checkpoint / part / "config.json"
    try:
        return json.loads(path.read_bytes())
    except OSError as error:
        raise JobError(f"{path}: {error.strerror}", "name a diffusers folder with tokenizer/, text_encoder/ and unet/"
                       ) from None
    except ValueError as error:
        raise JobError(f"{path} is not JSON: {error}", "restore the checkpoint") from None


def embed(checkpoint: Path, texts: list[str]) -> Tensor:
    """fp16 [len(texts), tokens, width] of the checkpoint's tokenizer and text encoder. Raises JobError."""
    from transformers import CLIPTextModel, CLIPTokenizer  # takes seconds, and only this needs it

    try:
        tokenizer = CLIPTokenizer.from_pretrained(checkpoint / "tokenizer", local_files_only=True)
        encoder = CLIPTextModel.from_pretrained(checkpoint / "text_encoder", local_files_only=True).eval()
    except (OSError, ValueError, RuntimeError) as error:
        raise JobError(f"{checkpoint}: tokenizer or text encoder cannot be loaded: {error}",
                       "restore tokenizer/ and text_encoder/ of the checkpoint") from None
    tokens = tokenizer(texts, padding="max_length", truncation=True, return_tensors="pt",
                       max_length=encoder.config.max_position_embeddings)
    uses_mask = getattr(encoder.config, "use_attention_mask", False)
    with torch.no_grad():
        return encoder(tokens.input_ids, attention_mask=tokens.attention_mask if uses_mask else None)[0].half()


def check_rig(path: Path, rig: Rig) -> None:
    """Compare the rig that embeddings were made for (OUT.json beside them, where there is one) with `rig`. Raises
    JobError that says which side has what."""
    about = path.with_suffix(".json")
    if not about.is_file():
        return
    try:
        made_for = rigs.from_record(json.loads(about.read_bytes())["rig"])
    except (ValueError, KeyError, TypeError) as error:
        raise JobError(f"{about}: {error}", "make the embeddings again with `python -m jobs.data prompts`") from None
    if made_for.fingerprint != rig.fingerprint:
        raise JobError(f"prompt embeddings {path} belong to another rig: "
                       + rigs.mismatch("the embeddings' rig", made_for, "the data", rig),
                       "make them for this rig with `python -m jobs.data prompts --rig DATA`")


def check_embeddings(embeds: object, views: int, width: int, what: str) -> None:
    """Raises JobError for another shape, the wrong text encoder, or values that are not finite."""
    if not isinstance(embeds, Tensor) or embeds.dim() != 3 or len(embeds) != views:
        found = list(embeds.shape) if isinstance(embeds, Tensor) else type(embeds).__name__
        raise JobError(f"{what}: {found}, not [{views} views, tokens, {width}]",
                       "make them for this rig with `python -m jobs.data prompts`")
    if embeds.shape[2] != width:
        raise JobError(f"{what}: {embeds.shape[2]} wide, the UNet's cross-attention takes {width}: "
                       f"made with the wrong text encoder ({_whose(embeds.shape[2])})",
                       "make them with this checkpoint's own: `python -m jobs.data prompts CHECKPOINT OUT.pt`")
    if not bool(embeds.isfinite().all()):
        raise JobError(f"{what}: not all values are finite", "make them again; is the text encoder damaged?")


def cosines(embeds: Tensor) -> Tensor:
    """[V, V] cosines between the flattened embeddings of the views."""
    flat = torch.nn.functional.normalize(embeds.double().flatten(1), dim=1)
    return flat @ flat.T


def alike_pairs(embeds: Tensor) -> list[tuple[int, int, float]]:
    """The pairs of views that are hard to tell apart, the worst first."""
    table = cosines(embeds)
    pairs = [(a, b, table[a, b].item()) for a in range(len(table)) for b in range(a + 1, len(table))]
    return sorted((pair for pair in pairs if pair[2] > ALIKE), key=lambda pair: -pair[2])


def _table(report: dict[str, Any], alike: list[tuple[int, int, float]]) -> str:
    lines = [f"{report['out']}: {report['shape']}, rig {report['rig'][:12]}"]
    lines += [f"  {text}" for text in report["prompts"]]
    lines += [f"warning: {report['prompts'][a]!r} and {report['prompts'][b]!r} have cosine {value:.4f}: the model can "
              "hardly tell these views apart\n  give them clearer --names" for a, b, value in alike]
    return "\n".join(lines)
