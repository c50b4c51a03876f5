"""launch restart: the same job again, from its last verified checkpoint."""
from __future__ import annotations

from collections.abc import Sequence

from launcher import api, sentences
from launcher.commands._common import here, parser, tell
from launcher.errors import Interrupted


def run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    again = api.plan_restart(args.job, sets=args.set, fresh_code=args.fresh_code, start=here())
    for note in again.notes:
        tell(note)
    for number, plan in enumerate(again.plans):
        tell(sentences.restart_plan(plan, bool(args.set) and number == 0))
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
    p.add_argument("job", metavar="JOB",
                   help="an id, the beginning of one, a name, @last; a sweep or pipeline: what has failed of it; "
                        "PIPELINE.STAGE: that stage and what follows from it")
    p.add_argument("--set", action="append", default=[], metavar="A.B=V",
                   help="change its config; may stand several times")
    p.add_argument("--fresh-code", action="store_true",
                   help="with the code as it is now, not as it was submitted")
    return p
