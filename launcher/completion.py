"""What can stand next on a command line of `launch`: verbs, options, jobs, nodes, stages, run files.

Asked at every press of the Tab key, so nothing heavy is loaded: jobs come from the index, read as it is; names of
nodes, stages and run files from the files themselves, without a YAML reader.
"""
from __future__ import annotations

import argparse
import importlib
import re
import shlex
import sqlite3
from collections.abc import Callable, Sequence
from pathlib import Path

import configs
from cluster.inventory import client_state_dir
from configs.places import find_cluster, upward
from launcher.cli import VERBS

FILES = None  # what stands there is a file: the shell knows them
_RECENT = 100  # ended jobs that are offered
_BUSY_S = 0.2
_NODE_OPTIONS = ("--node",)
_ENTRY = re.compile(r"( +)(\"[^\"]+\"|'[^']+'|[^\s#:\"']+)\s*:(?:\s|$)")  # a key of a mapping, in block style


def candidates(words: Sequence[str], start: Path) -> list[str] | None:
    """Every word that could replace the last of `words` (what stands behind `launch`, up to the cursor); FILES."""
    *before, current = words
    if not before:
        return _fitting([*VERBS, "--help", "--version"], current)
    if before[0] not in VERBS:
        return []
    if "--" in before:
        return FILES
    parser: argparse.ArgumentParser = importlib.import_module(f"launcher.commands.{before[0]}")._parser()
    options = parser._option_string_actions
    name, equals, value = current.partition("=")
    if current.startswith("-") and not equals:
        return _fitting([word for word in options if word.startswith("--") or current == "-"], current)
    if equals and name in options:
        found = _values(options[name], value, before, start)
        return found if found is FILES else [f"{name}={word}" for word in found]
    if (last := options.get(before[-1])) is not None and last.nargs != 0 and len(before) > 1:
        return _values(last, current, before, start)
    at = len(_positionals(before[1:], options))
    places = parser._get_positional_actions()
    if not places or at >= len(places) and places[-1].nargs not in ("*", "+"):
        return []
    return _values(places[min(at, len(places) - 1)], current, before, start)


def _positionals(words: Sequence[str], options: dict[str, argparse.Action]) -> list[str]:
    """Those of the words that are neither an option nor its value."""
    return [word for number, word in enumerate(words) if not word.startswith("-") and not (
        number and words[number - 1] in options and options[words[number - 1]].nargs != 0)]


def _values(action: argparse.Action, current: str, before: Sequence[str], start: Path) -> list[str] | None:
    """What an option or a positional takes, by the words that its help has for it."""
    if action.choices:
        return _fitting(map(str, action.choices), current)
    if set(action.option_strings) & set(_NODE_OPTIONS):
        return _fitting([*nodes(start), "any"], current)
    kinds = re.sub(r"\[.*?\]", "", str(action.metavar or "")).split("|")
    if any(kind in ("DIR", "FILE", "FILE.html") for kind in kinds):
        return FILES
    found = [word for kind in kinds for word in _of_kind(kind, before, start)]
    return FILES if "PATH" in kinds and not _fitting(found, current) else _fitting(found, current)


def _of_kind(kind: str, before: Sequence[str], start: Path) -> list[str]:
    sources: dict[str, Callable[[], list[str]]] = {
        "JOB": lambda: jobs(only_running=before[0] == "kill"), "NODE": lambda: nodes(start),
        "NODE:PID": lambda: [f"{name}:" for name in nodes(start)], "STAGE": lambda: stages(start),
        "RUN": lambda: runs(start, next((word for word in before[1:] if word in stages(start)), "*")),
    }
    return sources[kind]() if kind in sources else [kind] if kind.isalpha() and kind.islower() else []


def _fitting(words: Sequence[str] | object, current: str) -> list[str]:
    return list(dict.fromkeys(word for word in words if word.startswith(current)))  # type: ignore[attr-defined]


# --- names --------------------------------------------------------------------------------------------------

def jobs(only_running: bool = False) -> list[str]:
    """Names and ids, of sweeps and pipelines too; those that have not ended first. Never waits for another client."""
    path = client_state_dir().absolute() / "index.sqlite"
    where = "WHERE ended = 0" if only_running else f"ORDER BY ended, submitted_at DESC LIMIT {_RECENT}"
    try:
        db = sqlite3.connect(f"{path.as_uri()}?mode=ro", uri=True, timeout=_BUSY_S)
        try:
            rows = db.execute(f"SELECT name, id, grouped FROM jobs {where}").fetchall()
        finally:
            db.close()
    except sqlite3.Error:  # there is none yet, or it is damaged: a real command says so
        return []
    return [*dict.fromkeys(word for row in rows for word in row if word), "@last"]


def nodes(start: Path) -> list[str]:
    """The names below `nodes:` of cluster.yaml, and `local`."""
    path = find_cluster(start)
    try:
        lines = path.read_text(encoding="utf-8").splitlines() if path else []
    except OSError:
        return ["local"]
    found, depth = ["local"], None
    inside = False
    for line in lines:
        if line and line[0] not in " #":
            inside = line.startswith("nodes:")
        elif inside and (entry := _ENTRY.match(line)) and depth in (None, len(entry[1])):
            depth = len(entry[1])
            found.append(entry[2].strip("\"'"))
    return found


def stages(start: Path) -> list[str]:
    return _names(start, "stages/*.yaml")


def runs(start: Path, stage: str) -> list[str]:
    return _names(start, f"runs/{stage}/*.yaml")


def _names(start: Path, pattern: str) -> list[str]:
    """Of the project around `start`, and of what launch comes with."""
    places = [*(above / "configs" for above in upward(start)), Path(configs.__file__).parent]
    return sorted({path.stem for place in places for path in place.glob(pattern)})


# --- shells -------------------------------------------------------------------------------------------------

def typed(words: Sequence[str], split: bool) -> tuple[list[str], str]:
    """The words as the person means them -> (words, what of the last one the shell does not replace).

    With `split` the shell has cut words at `=` and `:`, as bash does.
    """
    joined: list[str] = []
    kept = ""
    for word in words:
        if split and joined and (word[:1] in ("=", ":") or joined[-1][-1:] in ("=", ":")):
            kept = joined[-1] + (word if word in ("=", ":") else "")  # or the cursor stands right behind it
            joined[-1] += word
        else:
            kept = ""
            joined.append(word)
    return [_unquoted(word) for word in joined], _unquoted(kept)


def _unquoted(word: str) -> str:
    """A word without its quotes, also when the last one is still missing."""
    for closing in ("", "'", '"'):
        try:
            return "".join(shlex.split(word + closing))
        except ValueError:
            continue
    return word


SCRIPTS = {
    "bash": r"""
_launch() {
  local found code word
  found=$("$1" completion --words bash "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null); code=$?
  COMPREPLY=()
  if [ "$code" = 3 ]; then compopt -o default; return; fi
  while IFS= read -r word; do
    [ -z "$word" ] && continue
    case $word in *[=:]) compopt -o nospace ;; esac
    printf -v word %q "$word"
    COMPREPLY+=("$word")
  done <<< "$found"
}
complete -F _launch launch
""",
    "zsh": r"""
#compdef launch
_launch() {
  local found code
  found="$("${words[1]}" completion --words zsh "${(@Q)words[2,CURRENT]}" 2>/dev/null)"
  code=$?
  if [ "$code" = 3 ]; then _files; return; fi
  [ -n "$found" ] && compadd -- "${(@f)found}"
}
if [ "$funcstack[1]" = "_launch" ]; then _launch; else compdef _launch launch; fi
""",
    "fish": r"""
function __launch_complete
    set -l words (commandline -opc) (commandline -ct)
    $words[1] completion --words fish $words[2..-1] 2>/dev/null
    test $status -eq 3; and __fish_complete_path (commandline -ct)
end
complete -c launch -f -a '(__launch_complete)'
""",
}
