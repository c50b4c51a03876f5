"""launch wait: blocks until jobs have ended."""
from __future__ import annotations

import shlex
from collections.abc import Sequence

from launcher import api, sentences
from launcher.commands._common import here, parser, tell
from launcher.errors import Interrupted


def run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    try:
        ended = api.wait(args.jobs, tell=tell, start=here())
    except KeyboardInterrupt:
        names = shlex.join(args.jobs)
        raise Interrupted("\nnot waiting any more; the jobs go on",
                          hint=f"come back: launch wait {names}\n  stop them: launch kill {names}") from None
    for job in ended:
        tell(sentences.fate(job))
    return int(any(job.state != "COMPLETED" for job in ended))


def _parser():
    p = parser("wait", "Block until jobs have ended. Exit code 0 only if all of them completed.")
    p.add_argument("jobs", nargs="+", metavar="JOB", help="an id, the beginning of one, a name, @last")
    return p
