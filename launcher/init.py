"""`launch init`: a cluster.yaml from what a person's ssh knows and what SLURM says."""
from __future__ import annotations

import json
import os
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from cluster.contract import write_atomically
from cluster.sshconfig import host_names
from configs.places import find_cluster
from launcher import discovery
from launcher.discovery import Found
from launcher.errors import Refused
from launcher.nodes import LOCAL, node_named
from launcher.views import first_line, visible

_PLAIN = re.compile(r"[A-Za-z_][A-Za-z0-9_.-]*")
_WORDS = frozenset({"true", "false", "null", "yes", "no", "on", "off", "y", "n"})
_TAKEN = (LOCAL, "any", "here")
_DEFAULT_CLUSTERS = ("", "cluster", "linux")  # what SLURM calls a cluster that nobody named


@dataclass(frozen=True)
class Initialised:
    """`entries`: what became of each host, in the order of the ssh configuration, this computer first."""

    path: Path
    entries: tuple[Entry, ...]


@dataclass(frozen=True)
class Entry:
    found: Found
    name: str  # in cluster.yaml
    via: str  # local, ssh or slurm
    left_out: str = ""  # why it is a comment in cluster.yaml


def init(start: Path, output: Path | None, ssh_config: str | None, workdir: str, force: bool,
         tell: Callable[[str], None]) -> Initialised:
    """Try every host, write the file. Raises Refused: there is one; Unusable: no such ssh configuration."""
    path = target(start, output, force)
    names = host_names(ssh_config)
    tell(f"trying {len(names)} hosts of your ssh configuration, at most {discovery.PROBE_S:.0f} s")
    here = node_named(LOCAL, Path("/"))
    found = discovery.discover(names, here, ssh_config, workdir)
    entries = tuple(chosen(found))
    write(path, text(entries, ssh_config, workdir))
    return Initialised(path, entries)


def target(start: Path, output: Path | None, force: bool) -> Path:
    """Where the file goes: the one that is in use here, else ~/.config/launch. Raises Refused: it is there."""
    home = Path(os.environ.get("XDG_CONFIG_HOME") or "~/.config").expanduser()
    path = output or find_cluster(start) or home / "launch" / "cluster.yaml"
    if path.exists() and not force:
        raise Refused("there is a cluster.yaml already", str(path),
                      "--force writes a new one and keeps this one as cluster.yaml.before; --output FILE writes "
                      "elsewhere; launch nodes tries those of this one")
    return path.absolute()


def chosen(found: Sequence[Found]) -> Iterator[Entry]:
    """What each host becomes: a node, a SLURM cluster by its login node, or a comment."""
    logins, names = _logins(found), [one.name for one in found]
    machines: dict[tuple[str, str, str], str] = {}
    for one in found:
        if one.machine and (first := machines.setdefault(one.machine, one.name)) != one.name:
            yield Entry(one, one.name, one.node.via, f"the same machine as {first}")
            continue
        slurm = one.survey["slurm"] if one.survey else None
        if not slurm:
            yield Entry(one, one.name, one.node.via, _why_not(one))
            continue
        login = logins[_key(slurm)]
        cluster = _cluster_name(slurm, login, names)
        if login is one:
            yield Entry(one, cluster, "slurm")
        else:
            yield Entry(one, one.name, one.node.via, _of_cluster(one, cluster))


def _of_cluster(one: Found, cluster: str) -> str:
    if not _runs_jobs(one):
        return f"another login node of the SLURM cluster {cluster}"
    assert one.survey
    return f"a machine of the SLURM cluster {cluster}: --node {cluster}:{_short(one.survey['hostname'])}"


def _why_not(one: Found) -> str:
    if one.name in _TAKEN[1:] or not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]*", one.name):
        return "no name for a node: give the host another one in the ssh configuration"
    if not one.shell:
        return one.problem
    return "" if one.reached else f"not reached: {one.problem}"


def _logins(found: Sequence[Found]) -> dict[str, Found]:
    """The host of each cluster that jobs are submitted from: here if SLURM is here, else one that runs no jobs."""
    chosen: dict[str, Found] = {}
    having = [one for one in found if one.survey and one.survey["slurm"]]
    for one in sorted(having, key=_runs_jobs):
        assert one.survey
        chosen.setdefault(_key(one.survey["slurm"]), one)
    return chosen


def _runs_jobs(one: Found) -> bool:
    assert one.survey
    return one.name != LOCAL and _short(one.survey["hostname"]) in one.survey["slurm"]["machines"]


def _key(slurm: dict[str, Any]) -> str:
    return json.dumps([slurm["cluster"], slurm["machines"]])


def _short(hostname: str) -> str:
    return hostname.partition(".")[0]


def _cluster_name(slurm: dict[str, Any], login: Found, names: Sequence[str]) -> str:
    """What SLURM calls it, where that is a name of its own; else that of its login node."""
    name = slurm["cluster"]
    if name in _DEFAULT_CLUSTERS or name in names or name in _TAKEN or not _PLAIN.fullmatch(name):
        return "slurm" if login.name == LOCAL else login.name
    return name


# --- the file -----------------------------------------------------------------------------------------------

def write(path: Path, content: str) -> None:
    """A file that does not load is never put in the place of another one."""
    from configs.load import read_cluster

    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f".{path.name}.{os.getpid()}")
    write_atomically(aside, content.encode())
    try:
        read_cluster(aside)
        if path.exists():
            os.replace(path, path.with_name(path.name + ".before"))
        os.replace(aside, path)
    finally:
        aside.unlink(missing_ok=True)


def text(entries: Sequence[Entry], ssh_config: str | None, workdir: str) -> str:
    lines = [f"# Written by `launch init` on {time.strftime('%Y-%m-%d')}. Every setting: configs/cluster.example.yaml",
             *([f"ssh_config: {_word(str(Path(ssh_config).expanduser().absolute()))}"] if ssh_config else []), ""]
    written = [entry for entry in entries if not entry.left_out and entry.via != "local"]
    lines.append("nodes:" if written else "nodes: {}")
    for entry in written:
        lines += ["", *_node(entry, workdir)] if entry is not written[0] else _node(entry, workdir)
    if left_out := [entry for entry in entries if entry.left_out]:
        lines += ["", "# Left out:", *(line for entry in left_out for line in _comment(entry))]
    return "\n".join(lines) + "\n"


def _node(entry: Entry, workdir: str) -> list[str]:
    found, said = entry.found, entry.found.survey or {}
    lines = [f"  {_word(entry.name)}:", f"    via: {entry.via}"]
    if entry.via == "slurm":
        lines.append(f"    login: {'here' if found.name == LOCAL else _word(found.name)}")
        partitions = said["slurm"]["partitions"]
        lines.append(f"    # partition: {said['slurm']['default'] or partitions[0] if partitions else 'NAME'}"
                     f"   # there are {', '.join(partitions)}")
    else:
        lines.append(f"    host: {_word(found.name)}")
    lines.append(f"    workdir: {_word(workdir)}")
    if found.login == "openssh" and found.why_openssh:
        lines.append(f"    ssh: {{client: openssh}}   # fabric: {_one_line(found.why_openssh)}")
    if names := said.get("conda"):
        lines.append(f"    # env: {{conda: NAME}}   # there are {', '.join(names)}")
    return [*lines, *(f"    # {_one_line(remark)}" for remark in remarks(entry))]


def _comment(entry: Entry) -> list[str]:
    return [f"#   {_one_line(entry.found.name)}: {{via: ssh}}   # {_one_line(entry.left_out)}"]


def remarks(entry: Entry) -> list[str]:
    """What a person has to know or do about a node that is written down."""
    found, said = entry.found, entry.found.survey or {}
    told = [found.problem] if found.problem and not entry.left_out else []
    if said.get("kills_at_logout") and not said["lingers"]:
        where = "" if found.name == LOCAL else f"ssh {found.name} "
        told.append("KillUserProcesses=yes: what you start there ends when you log out; this lets it stay: "
                    f"{where}loginctl enable-linger")
    if entry.via == "slurm" and said and not said["submitit"]:
        told.append(f"its Python needs submitit: {said['executable']} -m pip install --user submitit, or name another "
                    "one with agent_python:")
    return told


def _word(value: str) -> str:
    plain = _PLAIN.fullmatch(value) and value.lower() not in _WORDS
    return value if plain else json.dumps(value, ensure_ascii=False)


def _one_line(value: str) -> str:
    return visible(first_line(value))
