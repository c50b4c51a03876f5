"""What can be known of a job before it is started, without loading anything: the quick tier of `launch check`.

Answered with `prepare`, so a submit pays no round trip for it. What the job's own Python must be asked, and what takes
longer, is in `check_deep`.
"""
from __future__ import annotations

import os
import shlex
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from cluster.node import check_files, environment

Severity = Literal["error", "warning", "info"]
SEVERITIES = ("error", "warning", "info")


@dataclass(frozen=True)
class Found:
    """One thing that was found before a job was started."""

    check: str  # which one; docs/check.md explains each
    severity: Severity
    what: str
    where: str  # a key of the config, a file, a node
    why: str  # it matters
    fix: str  # a command, or what to do

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Found:
        return cls(**raw)


@dataclass(frozen=True)
class Asked:
    """What a client wants to know of a run. `inputs`: dotted key -> path on the node."""

    again: tuple[str, ...]  # the words after `launch check` that ask the same: the stage and its options
    node: str
    inputs: Mapping[str, str]
    skips_bad: bool = False  # bad samples are left out
    resume: str = ""  # a checkpoint
    total: int | None = None  # steps
    ports: tuple[int, ...] = ()  # that its environment names

    @classmethod
    def from_json(cls, raw: Mapping[str, Any]) -> Asked:
        return cls(**{**raw, "again": tuple(raw["again"]), "ports": tuple(raw["ports"])})

    def set(self, key: str, value: object) -> str:
        """The command that looks again with another value."""
        return self._but("--set", f"{key}=", f"{key}={value}")

    def changed(self, key: str, value: object) -> str:
        """The same for what may be the checkpoint to resume from, which is no key of the config."""
        return self._but("--resume", "", str(value)) if key == "resume" else self.set(key, value)

    def _but(self, option: str, old: str, new: str) -> str:
        """The same words with `option new`, in place of an `option` that begins with `old`."""
        pairs = list(zip(self.again, (*self.again[1:], "")))
        gone = {at for number, (word, value) in enumerate(pairs) if word == option and value.startswith(old)
                for at in (number, number + 1)}
        words = [word for number, word in enumerate(self.again) if number not in gone]
        return shlex.join(["launch", "check", *words, option, new])


def quick(raw: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Everything that is wrong with the inputs of `Asked`, as JSON, the worst first."""
    asked = Asked.from_json(raw)
    found = [one for look in (_inputs, _rigs, _prompts, _resume, _ports) for one in look(asked)]
    return [asdict(one) for one in by_severity(found)]


def by_severity(found: Iterable[Found]) -> list[Found]:
    return sorted(found, key=lambda one: SEVERITIES.index(one.severity))


# --- inputs -------------------------------------------------------------------------------------------------

def _inputs(asked: Asked) -> Iterator[Found]:
    for key, given in asked.inputs.items():
        path = Path(given).expanduser()
        if not path.exists():
            yield Found("inputs", "error", f"there is no {path}", key, "the job cannot begin without it",
                        asked.set(key, f"/path/on/{asked.node}"))
        elif not os.access(path, os.R_OK):
            yield Found("inputs", "error", f"{path} cannot be read", key, "the job runs as you, and you may not",
                        f"chmod u+r {shlex.quote(str(path))}, or ask its owner")
        elif lists := check_files.lists_of(key, path):
            for one in lists:
                yield from _list(asked, key, one)
        else:
            yield from _weights(asked, key, path)


def _list(asked: Asked, key: str, path: Path) -> Iterator[Found]:
    try:
        names, missing, looked = check_files.look_at_list(path)
    except check_files.Unsound as error:
        yield Found("lists", "error", str(error), key, "its lines are the samples",
                    asked.set(key, "/path/to/list.txt"))
        return
    if not missing:
        return
    some = ", ".join(missing[:3]) + (" …" if len(missing) > 3 else "")
    all_gone = len(missing) == looked
    severity: Severity = "warning" if asked.skips_bad and not all_gone else "error"
    yield Found("lists", severity, f"{len(missing)} of {looked} samples looked at (of {names}) have no "
                f"opencv_cameras.json: {some}",
                f"{key}: {path}",
                "bad samples are left out, and the set is smaller than you think" if severity == "warning"
                else "training stops at a bad sample", f"python -m jobs.data check {shlex.quote(str(path))}")


def _weights(asked: Asked, key: str, path: Path) -> Iterator[Found]:
    try:
        check_files.check_weights(path)
    except check_files.Unsound as error:
        yield Found("checkpoint", "error", str(error), key, "its weights could not be loaded, or not all of them",
                    asked.changed(key, "/path/to/a/whole/checkpoint"))


# --- rigs ---------------------------------------------------------------------------------------------------

_TRAIN, _VAL = "training.dataset.path", "training.validation.path"
# (one input, another, severity when their rigs differ, why it matters)
_PAIRS: tuple[tuple[str, str, Severity, str], ...] = (
    (_TRAIN, _VAL, "error", "validation through other cameras measures something else; the stage refuses it"),
    ("generator.checkpoint", "reconstructor.checkpoint", "error",
     "one makes views that the other was not trained on; the stage refuses it"),
    ("pretrained", _TRAIN, "warning", "views, cameras and prompts are learned together; it must learn them anew"),
    ("init_from", _TRAIN, "warning", "what it learned of the old cameras does not carry over by itself"),
    ("resume", _TRAIN, "error", "a run goes on only with the rig it began with"))


def _rigs(asked: Asked) -> Iterator[Found]:
    known = {key: Path(path).expanduser() for key, path in {**asked.inputs, "resume": asked.resume}.items() if path}
    rigs = {key: check_files.rig_of(path) for key, path in known.items()}
    for one, other, severity, why in _PAIRS:
        ours, theirs = rigs.get(one), rigs.get(other)
        if ours and theirs and ours != theirs:
            yield Found("rig", severity, f"{known[one]} belongs to rig {ours[:12]}, {known[other]} to rig "
                        f"{theirs[:12]}", f"{one}, {other}", why,
                        f"python -m jobs.data check {shlex.quote(str(known[other]))} --json  # says which rig has what")
    if asked.inputs.get(_TRAIN) and (views := check_files.views_of(known[_TRAIN])):
        for key in ("pretrained", "resume"):
            trained = check_files.trained_views(known[key]) if key in known else None
            if trained and trained != views:
                yield Found("rig", "error" if key == "resume" else "warning",
                            f"{known[key]} makes {trained} views, the samples have {views}", key,
                            "there is a prompt and a place in the network for each view",
                            asked.changed(key, f"/path/to/one/of/{views}/views"))


_TEXT_ENCODERS = {768: "CLIP ViT-L/14, of Stable Diffusion 1.5", 1024: "OpenCLIP ViT-H/14, of Stable Diffusion 2.1"}


def _prompts(asked: Asked) -> Iterator[Found]:
    """One for each view of the UNet, as wide as its cross-attention takes them."""
    for key, folder in (("prompt_embeds", "pretrained"), ("generator.prompt_embeds", "generator.checkpoint")):
        if folder not in asked.inputs:
            continue
        unet = check_files.unet_takes(Path(asked.inputs[folder]).expanduser())
        given = Path(asked.inputs.get(key, asked.inputs[folder])).expanduser()
        shape = check_files.prompts_shape(given)
        if not unet or not shape or (shape[0], shape[2]) == unet:
            continue
        made_by = _TEXT_ENCODERS.get(shape[2], "another text encoder") if shape[2] != unet[1] else ""
        yield Found("rig", "error", f"the prompts in {given} are of {shape[0]} views and {shape[2]} wide"
                    f"{made_by and f' ({made_by})'}, the UNet in {asked.inputs[folder]} takes {unet[0]} views and "
                    f"{unet[1]}", key, "each view is told by its prompt; the stage refuses it",
                    f"python -m jobs.data prompts {shlex.quote(asked.inputs[folder])} OUT.pt --rig …")


# --- resume, ports ------------------------------------------------------------------------------------------

def _resume(asked: Asked) -> Iterator[Found]:
    path = Path(asked.resume)
    if not asked.resume or not path.exists():  # submit itself refuses one that is not there
        return
    yield from _weights(asked, "resume", path)
    step = check_files.step_of(path)
    if step is not None and asked.total is not None and step >= asked.total:
        yield past_the_end(str(path), step, asked.total, asked.set("training.max_steps", step + asked.total))


def past_the_end(path: str, step: int, total: int, fix: str) -> Found:
    return Found("resume", "error", f"the checkpoint is at step {step} and the run ends at step {total}", path,
                 "it would end at once and look like a success", fix)


def _ports(asked: Asked) -> Iterator[Found]:
    try:
        environment.free_port()
    except OSError as error:
        yield Found("port", "error", f"no port can be had: {error.strerror}", asked.node,
                    "ranks find each other through one", "ss -s on the node shows who has so many")
    for port in asked.ports:
        if not port_is_free(port):
            yield Found("port", "error", f"port {port} is in use", f"{asked.node}: MASTER_PORT", "ranks of two jobs "
                        "would meet there", "remove MASTER_PORT from `env:`; launch finds a free one")


def port_is_free(port: int) -> bool:
    import socket

    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("", port))
        except OSError:
            return False
    return True


def worst(found: Sequence[Mapping[str, Any]]) -> str:
    """The severity of the worst; empty: nothing was found."""
    return next((one for one in SEVERITIES if any(each["severity"] == one for each in found)), "")
