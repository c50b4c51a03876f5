"""`launch`: finds the verb, runs it, turns what went wrong into one message and an exit code.

Exit codes: 0 done, 1 the job or check failed, 2 usage or configuration, 3 a node cannot be reached,
4 refused, 130 Ctrl-C.
A verb is a module of `launcher.commands`, imported when it is asked for: `--help` and `status` load little.
"""
from __future__ import annotations

import importlib
import os
import sys
from collections.abc import Sequence

from launcher import clock as _clock  # noqa: F401  before anything takes its time

VERBS = {
    "submit": "start a stage, or any command, as a job",
    "status": "what is running where",
    "logs": "what a job printed",
    "kill": "checkpoint, stop and verify that nothing is left",
    "restart": "the same job again, from its last verified checkpoint",
    "wait": "block until jobs have ended",
    "show": "everything known about a job",
    "compare": "how jobs differ, and how well each did",
    "check": "what would go wrong with a job, before it is started",
    "doctor": "is it learning? what is wrong, why, and the command that helps",
    "report": "a page about a job: curves, pictures, findings, where its time went",
    "pull": "fetch what a job has made",
    "prune": "give disk back, never the only good checkpoint",
    "nodes": "the machines: GPUs and whose they are, disk, load, our jobs",
    "ps": "what runs on a node, and what of it could be adopted",
    "adopt": "take a program that runs already under status, logs, kill and restart",
    "init": "write a cluster.yaml from ~/.ssh/config and sinfo, and test every node",
    "completion": "a script that lets the shell complete verbs, jobs, nodes and stages",
}
_USAGE = "usage: launch VERB …      (launch VERB --help says more)"


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command line -> its exit code."""
    code = _main(argv)
    if argv is None and _late_questions():
        sys.stdout.flush()
        os._exit(code)  # ending a thread in the middle of a library's call makes some of them abort the process
    return code


def _late_questions() -> bool:
    """Whether a node that did not answer in time is still being asked."""
    asking = sys.modules.get("launcher.reconcile")
    return asking is not None and asking.still_asking()


def _main(argv: Sequence[str] | None) -> int:
    from cluster.errors import ClusterError
    from configs.errors import ConfigError
    from launcher.errors import LaunchError

    _survive_odd_terminals()
    try:
        code = _run(list(sys.argv[1:] if argv is None else argv))
        sys.stdout.flush()
        return code
    except (LaunchError, ClusterError, ConfigError) as error:
        _say(error.exit_code, str(error))
        return error.exit_code
    except BrokenPipeError:  # `launch status | head -1`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return 130


def _run(argv: list[str]) -> int:
    verb = argv[0] if argv else "--help"
    if verb in ("-h", "--help", "help"):
        print(_help())
        return 0
    if verb == "--version":
        from importlib.metadata import version

        print(version("launch-lab"))
        return 0
    if verb not in VERBS:
        from launcher.errors import Wrong, nearest

        close = nearest(verb, VERBS)
        raise Wrong(f"no such verb: {verb!r}",
                    hint=(f"nearest: {close}; " if close else "") + f"verbs: {', '.join(VERBS)}")
    command = importlib.import_module(f"launcher.commands.{verb}")
    if verb not in ("kill", "completion") and "--help" not in argv:
        _go_on()
    return command.run(argv[1:])


def _go_on() -> None:
    """What an earlier command left to be submitted goes now, if it can."""
    from launcher import api

    for note in api.advance():
        print(note, file=sys.stderr)


def _help() -> str:
    lines = [f"  {verb:11}{summary}" for verb, summary in VERBS.items()]
    return "\n".join([_USAGE, "", *lines, "",
                      "A job is named by its id, the beginning of it, its --name, or @last."])


def _say(code: int, text: str) -> None:
    sys.stdout.flush()
    print(text if code == 130 else f"error: {text}", file=sys.stderr)


def _survive_odd_terminals() -> None:
    """A name the terminal's encoding cannot show is no reason to stop."""
    for stream in (sys.stdout, sys.stderr):
        if hasattr(stream, "reconfigure"):
            stream.reconfigure(errors="backslashreplace")


if __name__ == "__main__":
    sys.exit(main())
