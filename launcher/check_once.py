"""One problem is one finding: a path that is not there is met by a submit, by the quick tier and by the deep one."""
from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from cluster.node.check import Found

_OF_INPUTS = ("inputs", "lists", "samples", "checkpoint", "resume")


def keys(one: Found) -> set[str]:
    """The keys of the config that it is about; `resume`: of the checkpoint to resume from."""
    head = (one.what if one.check == "submit" else one.where).partition(": ")[0]
    return {name.removeprefix("--") for name in head.split(", ")}


def of_submit(found: list[Found]) -> list[Found]:
    """Without what the submit's own checks say of an input that the quick tier looked at too."""
    looked_at = set().union(*(keys(one) for one in found if one.check == "inputs"))
    return [one for one in found if one.check != "submit" or not keys(one) & looked_at]


def not_told(deep: Iterable[Found], quick: Iterable[Found]) -> list[Found]:
    """What the deep tier adds."""
    known = list(quick)
    return [one for one in deep if not any(_same(one, before) for before in known)]


def _same(deep: Found, quick: Found) -> bool:
    if deep.check == "samples" and quick.check == "lists" and ": " in quick.where:  # some of the list are not there
        return bool(keys(deep) & keys(quick)) and deep.what.partition(":")[0] in _names(quick)
    if quick.severity != "error":
        return False
    if deep.check in _OF_INPUTS and quick.check in ("submit", *_OF_INPUTS):
        return bool(keys(deep) & keys(quick))
    return (deep.check, deep.where) == (quick.check, quick.where)


def _names(missing: Found) -> list[str]:
    """Of the samples that a finding says are missing."""
    return missing.what.rpartition(": ")[2].removesuffix(" …").split(", ")
