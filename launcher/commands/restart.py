"""launch restart: the same job again, from its last verified checkpoint."""
from __future__ import annotations

import sys
from collections.abc import Sequence

from launcher import api, sentences
from launcher.commands._common import count, here, parser, seconds, split_command, tell
from launcher.errors import Interrupted
from launcher.restart import Restarted, RestartPlan


def run(argv: Sequence[str]) -> int:
    words, command = split_command(argv)
    args = _parser().parse_args(words)
    again = api.plan_restart(args.job, sets=args.set, fresh_code=args.fresh_code, node=args.node, gpus=args.gpus,
                             anew=args.resume == "never", time_s=seconds("--time", args.time), command=command,
                             start=here())
    for note in again.notes:
        tell(note)
    for number, plan in enumerate(again.plans):
        tell(sentences.restart_plan(plan, bool(args.set) and number == 0))
        try:
            done = _restarted(plan)
        except KeyboardInterrupt:
            raise Interrupted(f"\nnot waiting any more; a restart that {plan.job.node} has heard goes on",
                              hint=f"see it with: launch status {plan.job.id}") from None
        tell(sentences.restarted(done))
        print(done.id)
    return 0


def _restarted(plan: RestartPlan) -> Restarted:
    if plan.move is None or plan.move.shares or not sys.stderr.isatty():
        return api.restart(plan)
    from launcher.commands.pull import Bar

    bar = Bar()
    try:
        return api.restart(plan, progress=bar.draw)
    finally:
        bar.clear()


def _parser():
    p = parser("restart", "The same job, next attempt, from its last verified checkpoint.",
               "launch restart JOB [options]\n       launch restart JOB [--fresh-code] -- CMD ARG...     "
               "a command with other words")
    p.add_argument("job", metavar="JOB",
                   help="an id, the beginning of one, a name, @last; a sweep or pipeline: what has failed of it; "
                        "PIPELINE.STAGE: that stage and what follows from it")
    p.add_argument("--set", action="append", default=[], metavar="A.B=V",
                   help="change its config; may stand several times")
    p.add_argument("--fresh-code", action="store_true",
                   help="with the code as it is now, not as it was submitted")
    p.add_argument("--resume", choices=("auto", "never"), default="auto", metavar="auto|never",
                   help="never: begin anew, not from its checkpoints; default: auto")
    p.add_argument("--node", metavar="N",
                   help="on another machine; to one that does not see the job's directory the job and its last "
                        "verified checkpoint are brought")
    p.add_argument("--gpus", type=count, metavar="N", help="with so many GPUs; those it has are given up first")
    p.add_argument("--time", metavar="24h", help="with this time limit")
    return p
