"""Jobs whose run directories one machine sees: this computer, one that ssh reaches, the login node of a SLURM
cluster. Agents and supervisors there do the work; these are questions.
"""
from __future__ import annotations

import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import PurePosixPath
from typing import Any

from cluster.asking import Answer, Frame, Payload, Shell
from cluster.inventory import Node
from cluster.spec import JobSpec, PythonEnv


class HostBackend:
    def __init__(self, node: Node, shell: Shell | None = None) -> None:
        self.node = node
        self._shell = shell or shell_for(node)

    def prepare(self, code_digest: str | None = None, stat: Sequence[str] = (),
                python: PythonEnv | None = None, cwd: str | None = None, slurm: JobSpec | None = None,
                busy: str = "", cost: Mapping[str, Any] | None = None, force: bool = False,
                check: Mapping[str, Any] | None = None, secrets: Sequence[str] = ()) -> Answer:
        return self._shell.ask({
            "op": "prepare", "workdir": self.node.workdir, "code_digest": code_digest, "stat": list(stat),
            "cwd": cwd, "need_python": asdict(python or self.node.python),
            "slurm_spec": asdict(slurm) if slurm else None, "busy": busy, "cost": cost,
            "force": force, "check": dict(check) if check else None, "secrets": list(secrets)})

    def check(self, spec: JobSpec, config: str | None, code: Payload = b"", resume: str = "") -> Answer:
        return self._shell.ask({"op": "check", "workdir": self.node.workdir, "spec": asdict(spec), "config": config,
                                "resume": resume}, code)

    def machines(self) -> list[dict[str, Any]]:
        return self._shell.ask({"op": "machines"})["machines"]

    def render(self, spec: JobSpec) -> list[list[str]]:
        from cluster.node import torchrun
        config = PurePosixPath(self.node.workdir) / "runs" / spec.id / "attempts" / "000" / "config.yaml"
        argv = torchrun.program(spec, python_word(spec.python), config)
        if spec.kind != "torchrun":
            return [argv]
        world = "--standalone" if spec.nodes == 1 else f"--nnodes={spec.nodes}"
        return [["torchrun", world, f"--nproc-per-node={spec.ranks}", "--max-restarts=0", "--no-python", "--", *argv]]

    def submit(self, spec: JobSpec, config: str | None, secrets: Mapping[str, str],
               code: Payload = b"", no_wait: bool = False, force: bool = False) -> Answer:
        return self._shell.ask({"op": "submit", "workdir": self.node.workdir, "spec": asdict(spec),
                                "config": config, "secrets": dict(secrets), "no_wait": no_wait,
                                "force": force}, code)

    def submit_array(self, specs: Sequence[JobSpec], configs: Sequence[str | None],
                     secrets: Mapping[str, str], parallel: int = 0, code: Payload = b"") -> list[Answer]:
        return self._shell.ask({
            "op": "submit_array", "workdir": self.node.workdir, "specs": [asdict(spec) for spec in specs],
            "configs": list(configs), "secrets": dict(secrets), "parallel": parallel}, code)["jobs"]

    def find(self, tokens: Sequence[str]) -> list[Answer]:
        return self._shell.ask({"op": "find", "workdir": self.node.workdir, "tokens": list(tokens)})["found"]

    def status(self, run_dirs: Sequence[str] | None, active_only: bool = False,
               timeout_s: float | None = None) -> Answer:
        return self._shell.ask({"op": "status", "workdir": self.node.workdir, "active_only": active_only,
                                "asked_at": time.time(), "tells": [asdict(tell) for tell in self.node.notify],
                                "jobs": None if run_dirs is None else list(run_dirs)}, timeout_s=timeout_s)

    def show(self, run_dir: str) -> Answer:
        return self._shell.ask({"op": "show", "run_dir": run_dir})

    def metrics(self, run_dir: str, keys: Sequence[str] = ()) -> list[dict[str, Any]]:
        return self._shell.ask({"op": "metrics", "run_dir": run_dir, "keys": list(keys)})["lines"]

    def doctor(self, run_dir: str, points: int = 0) -> Answer:
        return self._shell.ask({"op": "doctor", "run_dir": run_dir, "points": points})

    def compare(self, run_dirs: Sequence[str], points: int, reach: Sequence[tuple[str, float]] = ()) -> list[Answer]:
        return self._shell.ask({"op": "compare", "jobs": list(run_dirs), "points": points,
                                "reach": [list(one) for one in reach]})["jobs"]

    def code_files(self, run_dir: str) -> dict[str, str] | None:
        return self._shell.ask({"op": "code_files", "run_dir": run_dir})["files"]

    def code_texts(self, run_dir: str, paths: Sequence[str]) -> dict[str, str]:
        return self._shell.ask({"op": "code_texts", "run_dir": run_dir, "paths": list(paths)})["texts"]

    def commits(self, directory: str, old: str, new: str) -> list[tuple[str, int | None, int | None]] | None:
        found = self._shell.ask({"op": "commits", "directory": directory, "old": old, "new": new})["files"]
        return found and [(path, added, removed) for path, added, removed in found]

    def kill(self, run_dir: str, by: str, grace_s: float | None = None, now: bool = False) -> Answer:
        return self._shell.ask({"op": "kill", "run_dir": run_dir, "by": by, "grace_s": grace_s, "now": now})

    def kill_all(self, run_dirs: Sequence[str], by: str, grace_s: float | None = None,
                 now: bool = False) -> list[Answer]:
        return self._shell.ask({"op": "kill_all", "run_dirs": list(run_dirs), "by": by, "grace_s": grace_s,
                                "now": now})["jobs"]

    def join(self, run_dir: str, node: int) -> Answer:
        return self._shell.ask({"op": "join", "run_dir": run_dir, "node": node})

    def revive(self, run_dir: str) -> Answer:
        return self._shell.ask({"op": "revive", "run_dir": run_dir})

    def discard(self, run_dirs: Sequence[str]) -> None:
        self._shell.ask({"op": "discard", "run_dirs": list(run_dirs)})

    def adopt(self, request: Mapping[str, Any]) -> Answer:
        return self._shell.ask({**request, "op": "adopt", "workdir": self.node.workdir})

    def census(self) -> Answer:
        return self._shell.ask({"op": "census", "workdir": self.node.workdir, "slurm": self.node.via == "slurm"})

    def survey(self, token: str) -> Answer:
        return self._shell.ask({"op": "survey", "workdir": self.node.workdir, "token": token})

    def sees(self, tokens: Mapping[str, str], forget: str | None = None) -> list[str]:
        return self._shell.ask({"op": "sees", "tokens": dict(tokens), "forget": forget})["seen"]

    def processes(self) -> list[dict[str, Any]]:
        return self._shell.ask({"op": "processes"})["processes"]

    def reach(self, peer: Sequence[str]) -> str | None:
        return self._shell.ask({"op": "reach", "peer": list(peer)})["problem"]

    def fetch(self, run_dir: str, what: str) -> Iterator[Frame]:
        return self._shell.stream({"op": "fetch", "run_dir": run_dir, "what": what})

    def place(self, frames: Payload) -> str:
        return self._shell.ask({"op": "place", "workdir": self.node.workdir}, frames)["path"]

    def files(self, run_dir: str, pattern: str | None = None) -> Answer:
        return self._shell.ask({"op": "files", "run_dir": run_dir, "pattern": pattern})

    def pull(self, run_dir: str, files: Sequence[Sequence[str | int]]) -> Iterator[Frame]:
        return self._shell.stream({"op": "pull", "run_dir": run_dir, "files": [list(one) for one in files]})

    def prune(self, run_dirs: Sequence[str], keep_last: int, dry_run: bool, keep: Sequence[str]) -> list[Answer]:
        return self._shell.ask({"op": "prune", "run_dirs": list(run_dirs), "keep_last": keep_last,
                                "dry_run": dry_run, "keep": list(keep)})["jobs"]

    def leave_token(self, run_dir: str, token: str) -> str:
        return self._shell.ask({"op": "leave_token", "run_dir": run_dir, "token": token})["path"]

    def luggage(self, run_dir: str) -> Answer:
        return self._shell.ask({"op": "luggage", "run_dir": run_dir})

    def arrive(self, request: Mapping[str, Any], content: Payload) -> str:
        return self._shell.ask({**request, "op": "arrive", "workdir": self.node.workdir}, content)["run_dir"]

    def leave(self, run_dir: str, to: Mapping[str, Any], attempts: int) -> None:
        self._shell.ask({"op": "leave", "run_dir": run_dir, "to": dict(to), "attempts": attempts})

    def restart(self, run_dir: str, by: str, grace_s: float | None = None, spec: JobSpec | None = None,
                config: str | None = None, secrets: Mapping[str, str] | None = None,
                code: Payload = b"", released: bool = False) -> Answer:
        return self._shell.ask({
            "op": "restart", "run_dir": run_dir, "by": by, "grace_s": grace_s, "config": config, "released": released,
            "spec": asdict(spec) if spec else None, "secrets": dict(secrets or {})}, code)

    def logs(self, run_dir: str, *, ranks: str | Sequence[int] = "0", attempts: str | int = "last",
             lines: int | None = None, follow: bool = False, offsets: Mapping[str, int] | None = None,
             grep: str | None = None) -> Iterator[Frame]:
        return self._shell.stream({
            "op": "logs", "run_dir": run_dir, "ranks": ranks if isinstance(ranks, str) else list(ranks),
            "attempts": attempts, "lines": lines, "follow": follow, "offsets": dict(offsets or {}),
            "grep": grep})

    def close(self) -> None:
        self._shell.close()


def shell_for(node: Node) -> Shell:
    """Each way is loaded only when it is gone."""
    if node.via == "local" or (node.via, node.host) == ("slurm", "here"):
        from cluster.local import LocalShell
        return LocalShell(node)
    if node.ssh_client == "openssh":
        from cluster.openssh import OpenSshShell
        return OpenSshShell(node)
    from cluster.shell import SshShell
    return SshShell(node)


def python_word(python: PythonEnv) -> str:
    """The interpreter of an environment as a person would type it once that is activated."""
    words = {"python": python.value, "venv": f"{python.value}/bin/python", "conda": "python"}
    return words.get(python.kind, "python3")
