"""launch kill: checkpoint, stop, verify."""
from __future__ import annotations

import shlex
from collections.abc import Sequence

from launcher import api, sentences
from launcher.commands._common import here, parser, seconds, tell
from launcher.errors import Interrupted


def run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    grace_s = seconds("--grace", args.grace)
    try:
        results = api.kill(args.jobs, grace_s=grace_s, now=args.now, start=here())
    except KeyboardInterrupt:
        raise Interrupted("\nnot waiting any more; a stop that its node has heard goes on",
                          hint=f"see it with: launch status {shlex.join(args.jobs)}") from None
    for result in results:
        if result.error:
            tell(f"error: {result.id}: {result.error}")
        else:
            print(sentences.killed(result))
    return max(result.error.exit_code if result.error else int(bool(result.survivors)) for result in results)


def _parser():
    p = parser("kill", "Let jobs write a checkpoint, stop them, and verify that nothing of them is left.")
    p.add_argument("jobs", nargs="+", metavar="JOB", help="an id, the beginning of one, a name, @last")
    p.add_argument("--grace", metavar="60s",
                   help="how long it may take to save; default: 60 s, or three times its last save")
    p.add_argument("--now", action="store_true", help="do not wait for a checkpoint")
    return p
