"""The machines that a person's ssh knows, tried one by one: what `launch init` writes down and prints."""
from __future__ import annotations

import secrets
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from cluster.errors import ClusterError, NodeFailure, Unreachable
from cluster.inventory import Node
from cluster.sshconfig import resolve
from launcher import reconcile
from launcher.nodes import LOCAL

PROBE_S = 40.0  # by fabric, and then by ssh
SHARED_S = 10.0
_FORGES = ("github.com", "gitlab.com", "bitbucket.org", "codeberg.org", "ssh.dev.azure.com", "hf.co", "git.sr.ht")


@dataclass(frozen=True)
class Found:
    """One host. Without `survey` it cannot be used, or not yet: `problem` says why."""

    name: str
    node: Node
    survey: dict[str, Any] | None = None  # cluster/node/survey.py
    problem: str = ""
    shell: bool = True  # a person can log in there: it is no git server
    reached: bool = True
    why_openssh: str = ""  # what fabric could not do
    shares: tuple[str, ...] = ()  # which others see the same workdir

    @property
    def login(self) -> str:
        return self.node.ssh_client if self.reached and self.shell and self.node.via == "ssh" else ""

    @property
    def machine(self) -> tuple[str, str, str] | None:
        """The same for two names of one machine, as one user."""
        said = self.survey
        return (said["hostname"], said["boot_id"], said["user"]) if said else None


def discover(names: Sequence[str], here: Node, ssh_config: str | None, workdir: str) -> list[Found]:
    """This computer (`here`) first, then every host, all tried at the same time."""
    nodes = [here, *(Node(name, host=name, workdir=workdir, ssh_config=ssh_config) for name in names if name != LOCAL)]
    token = secrets.token_hex(8)
    answers = reconcile.ask_all({node.name: lambda node=node: _try(node, token) for node in nodes}, PROBE_S)
    found = [_late(node, answer) if isinstance(answer := answers[node.name], Exception) else answer for node in nodes]
    return _with_shared(found)


def _late(node: Node, error: Exception) -> Found:
    return Found(node.name, node, problem=getattr(error, "what", str(error)), reached=False)


def _try(node: Node, token: str) -> Found:
    """By fabric; where that cannot log in, by the ssh program."""
    try:
        if node.via == "ssh" and _is_forge(node):
            return Found(node.name, node, problem="a git server: it offers no shell", shell=False)
        return _asked(node, token)
    except Unreachable as error:
        other = replace(node, ssh_client="openssh")
        try:
            return replace(_asked(other, token), why_openssh=error.what) if node.via == "ssh" else _late(node, error)
        except Unreachable:  # fabric's words say more
            return _late(node, error)
    except ClusterError as error:
        return _late(node, error)


def _is_forge(node: Node) -> bool:
    target = resolve(node.ssh_name, node.ssh_config, node.connect_timeout_s)
    return target.user == "git" or target.hostname in _FORGES


def _asked(node: Node, token: str) -> Found:
    """Raises Unreachable: nobody could log in."""
    try:
        return Found(node.name, node, reconcile.backend_of(node).survey(f"{token}-{node.name}"))
    except Unreachable:
        raise
    except NodeFailure as error:
        return Found(node.name, node, problem=error.what.replace("\n ", ""), shell=False)
    except ClusterError as error:  # no Python there, or no place to write: a person can change that
        return Found(node.name, node, problem=error.what)


def _with_shared(found: Sequence[Found]) -> list[Found]:
    """Who reads the file that another one has written in its workdir; then everybody removes its own."""
    there = [one for one in found if one.survey]
    tokens = {one.name: str(one.survey["token"]) for one in there if one.survey}
    content = {path: path.rpartition("/")[2] for path in tokens.values()}
    seen = _ask(there, {one.name: (content, None) for one in there})
    _ask(there, {one.name: ({}, tokens[one.name]) for one in there})
    return [replace(one, shares=tuple(
        other for other, path in tokens.items() if other != one.name and path in seen.get(one.name, ())))
        for one in found]


def _ask(there: Sequence[Found], what: Mapping[str, tuple[dict[str, str], str | None]]) -> dict[str, list[str]]:
    answers = reconcile.ask_all(
        {one.name: lambda one=one: reconcile.backend_of(one.node).sees(*what[one.name]) for one in there}, SHARED_S)
    return {name: answer for name, answer in answers.items() if not isinstance(answer, Exception)}
