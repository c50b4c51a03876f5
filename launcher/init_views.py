"""`launch init` as text: a line per node, then what is to be done."""
from __future__ import annotations

from collections import Counter

from launcher.init import Entry, Initialised, remarks
from launcher.node_views import gigabytes, room
from launcher.views import aligned, first_line, visible

_NUMBERS = ("disk free", "inodes free")


_TITLES = ("node", "via", "login", "python", "psutil", "gpus", "disk free", "inodes free", "shares workdir with",
           "left out")


def table(done: Initialised) -> str:
    names = {entry.found.name: entry.name for entry in done.entries if not entry.left_out}
    rows = [_row(entry, names) for entry in done.entries]
    return aligned({title: [row.get(title, "") for row in rows] for title in _TITLES}, _NUMBERS)


def notes(done: Initialised) -> list[str]:
    found = [f"{entry.name}: {visible(remark)}" for entry in done.entries for remark in remarks(entry)]
    found += [f"{entry.name}: openssh, because fabric cannot: {visible(first_line(entry.found.why_openssh))}"
              for entry in done.entries if entry.found.why_openssh]
    return found


def summary(done: Initialised) -> str:
    kept = [entry.name for entry in done.entries if not entry.left_out and entry.via != "local"]
    left = sum(bool(entry.left_out) for entry in done.entries)
    count = f"{len(kept)} node{'' if len(kept) == 1 else 's'}"
    return f"{done.path}: {count}" + (f", {left} left out, each with its reason" if left else "") + \
        (f"\n  try: launch nodes; launch submit --node {kept[0]} -- hostname" if kept else
         "\n  no host of your ssh configuration can take jobs; `local`, this computer, always can")


def _row(entry: Entry, names: dict[str, str]) -> dict[str, str]:
    """`names`: host -> node, of those that were written down."""
    said = entry.found.survey
    row = {"node": entry.name, "via": "" if entry.left_out else entry.via, "login": entry.found.login}
    if said is None or entry.left_out:
        return row | {"left out": visible(first_line(entry.left_out))}
    inodes = said["disk"]["free_inodes"]
    return row | {
        "python": said["python"], "psutil": "yes" if said["psutil"] else "no", "gpus": _gpus(said),
        "disk free": room(said["disk"]["free_bytes"]), "inodes free": "" if inodes is None else f"{inodes:,}",
        "shares workdir with": ", ".join(names[other] for other in entry.found.shares if other in names)}


def _gpus(said: dict) -> str:
    if said["gpu_problem"]:
        return "?"
    models = Counter(f"{gpu['name']} {gigabytes(gpu['memory_mb'])}" for gpu in said["gpus"])
    return ", ".join(f"{count} x {visible(model)}" for model, count in models.items()) or "none"
