"""Runs SLURM's own programs, each with a time limit; what they cannot do is said in a person's words."""
from __future__ import annotations

import os
import subprocess
from collections.abc import Mapping, Sequence

_HABITS = ("SQUEUE_", "SACCT_", "SCANCEL_", "SINFO_")  # a person's: columns, filters, questions back
_PREFIXES = ("error: ", "slurm_load_jobs error: ", "slurm_persist_conn_open_without_init: ")


class SlurmFailed(Exception):
    """One of SLURM's programs failed; the message says which and why, `words` is all that it wrote to stderr."""

    def __init__(self, message: str, words: str = "") -> None:
        super().__init__(message)
        self.words = words


def run(argv: Sequence[str], limit_s: float, env: Mapping[str, str] | None = None) -> str:
    """What the program wrote to stdout. Raises SlurmFailed: it is not there, failed, or took too long."""
    tool = argv[0]
    try:
        done = subprocess.run(
            argv, stdin=subprocess.DEVNULL, capture_output=True, timeout=limit_s, check=False, cwd="/",
            env=_environment() | dict(env or {}))
    except FileNotFoundError:
        raise SlurmFailed(f"there is no {tool} on the PATH of {os.uname().nodename}") from None
    except OSError as error:
        raise SlurmFailed(f"{tool}: {error.strerror or error}") from None
    except subprocess.TimeoutExpired:
        raise SlurmFailed(f"{tool} did not answer in {round(limit_s, 1):g} s") from None
    if done.returncode:
        words = done.stderr.decode(errors="replace").strip()
        raise SlurmFailed(f"{tool}: {_last_line(tool, words) or f'exit code {done.returncode}'}", words)
    return done.stdout.decode(errors="replace")


def _environment() -> dict[str, str]:
    """Times as unix seconds, words in English, no habits of the person's."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(_HABITS)}
    return kept | {"LC_ALL": "C.UTF-8", "SLURM_TIME_FORMAT": "%s"}


def _last_line(tool: str, words: str) -> str:
    line = words.splitlines()[-1].strip() if words else ""
    for prefix in (f"{tool}: ", *_PREFIXES):
        line = line.removeprefix(prefix)
    return line
