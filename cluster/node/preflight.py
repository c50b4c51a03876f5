"""What an attempt asks before it starts its program: whether its inputs are what they were when it was submitted."""
from __future__ import annotations

from collections.abc import Sequence
from typing import Any


def look(*args: Any) -> dict[str, Any]:
    """`check_deep.before`, aside of the supervisor, which does without all that it loads."""
    from cluster.node import check_deep

    return check_deep.before(*args)


def said(found: Sequence[dict[str, Any]]) -> tuple[str, list[str]]:
    """-> (why it must not start, or empty; notes for the journal when it may)."""
    errors = [one for one in found if one["severity"] == "error"]
    if errors:
        return "\n  ".join(map(_told, errors)), []
    return "", [f"preflight: {one['where']}: {one['what']}" for one in found if one["severity"] == "warning"]


def _told(one: dict[str, Any]) -> str:
    """What to do stands in the first line: it is the one that a person is shown everywhere."""
    first, *details = one["what"].splitlines()
    fix = "" if one["fix"] in first else f"; {one['fix']}"
    return "\n".join([f"{one['where']}: {first}{fix}", *details])
