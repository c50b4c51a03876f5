"""launch restart: the same job again, from its last verified checkpoint."""
from __future__ import annotations

from collections.abc import Sequence

from launcher import api, sentences
from launcher.commands._common import here, parser, tell
from launcher.errors import Interrupted


def run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    plan = api.plan_restart(args.job, sets=args.set, fresh_code=args.fresh_code, start=here())
    tell(sentences.restart_plan(plan, bool(args.set)))
    try:
        done = api.restart(plan)
    except KeyboardInterrupt:
        raise Interrupted(f"\nnot waiting any more; a restart that {plan.job.node} has heard goes on",
                          hint=f"see it with: launch status {plan.job.id}") from None
    tell(sentences.restarted(done))
    print(done.id)
    return 0


def _parser():
    p = parser("restart", "The same job, next attempt, from its last verified checkpoint.")
    p.add_argument("job", metavar="JOB", help="an id, the beginning of one, a name, @last")
    p.add_argument("--set", action="append", default=[], metavar="A.B=V",
                   help="change its config; may stand several times")
    p.add_argument("--fresh-code", action="store_true",
                   help="with the code as it is now, not as it was submitted")
    return p
