"""The data tools: `python -m jobs.data VERB …` (see docs/data.md).

Exit codes: 0 done, 1 a check failed, 2 a mistake in the arguments or the data, 130 Ctrl-C.
"""
from __future__ import annotations

import argparse
import os
import sys

import torch

from jobs.data import center, check, identities, media, normalize, prompts, sounds, split, toy
from jobs.runtime import run_job

_VERBS = (check, normalize, center, split, prompts, toy, identities, media, sounds)


def main(arguments: list[str] | None = None) -> None:
    """Ends in SystemExit. Raises JobError."""
    parser = argparse.ArgumentParser(prog="python -m jobs.data", description="Look at data sets and make them.")
    verbs = parser.add_subparsers(required=True, metavar="VERB")
    for verb in _VERBS:
        verb.add(verbs)
    given = parser.parse_args(arguments)
    torch.set_num_threads(1)  # many small operations: threads get in each other's way, --workers do not
    try:
        code = given.run(given)
        sys.stdout.flush()
    except KeyboardInterrupt:
        sys.exit(130)
    except BrokenPipeError:  # the reader, such as `head`, has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(1)
    sys.exit(code)


if __name__ == "__main__":
    run_job(main, rank=0)
