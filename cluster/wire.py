"""What is sent to a node's shell. Quoting happens here and nowhere else.

The login shell may be bash, tcsh or fish and gets one constant line that means the same to all of them; sh
reads the real script from stdin, so nothing of a person's (paths, names) ever passes a shell it was not
quoted for.
"""
from __future__ import annotations

import shlex
from pathlib import Path

from cluster.inventory import USUAL_CONDA_BASES, Node
from cluster.node import install

# No quote, backslash, `!` or newline inside: what is special between single quotes differs between shells.
LINE = "exec sh -c 'read -r n && eval \"$(dd bs=1 count=\"$n\" 2>/dev/null)\"'"

NO_AGENT = 96  # exit codes of the scripts below
NO_PYTHON = (97, 126, 127)
_ON_PATH = ("python3", "python3.14", "python3.13", "python3.12", "python3.11", "python3.10", "python")
# Everywhere -I and -S: the agent needs the standard library alone, and site-packages make every start slow.
# Runs in whatever Python is found, however old.
_IS_PYTHON = """\
import sys
if sys.version_info < (3, 10): sys.exit(1)
import json
print(sys.argv[1] + json.dumps({"python": sys.executable}) + sys.argv[1])
"""
_HAS_SUBMITIT = "import importlib.util, sys; sys.exit(importlib.util.find_spec('submitit') is None)"


def framed(script: str) -> bytes:
    """What LINE reads from stdin: the script's size, then the script. The program's own stdin follows it."""
    raw = script.encode()
    return b"%d\n%b" % (len(raw), raw)


def run_agent(python: str, directory: str, command: str, mark: str) -> str:
    """Become the agent in `directory`; exit NO_AGENT or one of NO_PYTHON when that cannot be."""
    return (f"a={sh_path(directory)}; p={sh_path(python)}; "
            f"[ -d \"$a\" ] || exit {NO_AGENT}; [ -x \"$p\" ] || exit {NO_PYTHON[0]}; "
            f"exec \"$p\" -I -S \"$a\" {command} {mark}")


def find_python(node: Node, mark: str) -> str:
    """Print mark, JSON {python}, mark for the first Python >= 3.10; exit with the first of NO_PYTHON without
    one. Where jobs go to SLURM, one that has submitit is preferred.
    """
    places = " ".join(sh_path(place) for place in python_places(node))
    need = [f"\"$q\" -c {shlex.quote(_HAS_SUBMITIT)} 2>/dev/null && "] if node.via == "slurm" else []
    look = (f"for p in {places}; do q=$(command -v \"$p\" 2>/dev/null) || continue; "
            f"%s\"$q\" -I -S -c {shlex.quote(_IS_PYTHON)} {mark} 2>/dev/null && exit 0; done; ")
    return "".join(look.replace("%s", first, 1) for first in [*need, ""]) + f"exit {NO_PYTHON[0]}"


def python_places(node: Node) -> list[str]:
    """Where the agent's Python may be: `agent_python` and nothing else, or the jobs' environment, PATH,
    conda.
    """
    if node.agent_python:
        return [node.agent_python]
    bases = [node.python.conda_base] if node.python.conda_base else list(USUAL_CONDA_BASES)
    match node.python.kind:
        case "python":
            own = [node.python.value]
        case "venv":
            own = [f"{node.python.value}/bin/python"]
        case "conda":
            own = [f"{base}/envs/{node.python.value}/bin/python" for base in bases]
        case "system":
            own = []
    return [*own, *_ON_PATH, *(f"{base}/bin/python" for base in bases)]


def run_installer(python: str) -> str:
    text = Path(install.__file__).read_text(encoding="utf-8")
    return f"exec {sh_path(python)} -I -S -c {shlex.quote(text)}"


def sh_path(path: str) -> str:
    """A path as one word of sh; `~/` is the home on the node."""
    if path == "~" or path.startswith("~/"):
        return '"$HOME"' + (shlex.quote(path[1:]) if path[1:] else "")
    return shlex.quote(path)
