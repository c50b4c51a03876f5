"""launch status: what is running where."""
from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from launcher import api, views
from launcher.clock import BEGAN
from launcher.commands._common import columns, here, parser, tell

_EVERY_S = 2.0
_LEAST_S = 1.5  # for the nodes, however late it is
_HOME_AND_CLEAR = "\x1b[H\x1b[J"


def run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    if not args.watch:
        _draw(args, _ask(args, BEGAN))
        return 0
    try:
        _watch(args)
    except KeyboardInterrupt:
        tell("\nthe jobs go on; launch status shows them again, launch kill JOB stops one")
    return 130


def _parser():
    p = parser("status", "What is running where. Jobs that have ended are shown once, then only with --all.")
    p.add_argument("jobs", nargs="*", metavar="JOB",
                   help="only these: an id, the beginning of one, a name, @last")
    p.add_argument("--all", action="store_true", help="ended jobs too")
    p.add_argument("--watch", action="store_true", help="draw it again every 2 s until Ctrl-C")
    p.add_argument("--json", action="store_true", help="a list of objects")
    p.add_argument("--rescan", action="store_true", help="first ask every node for every job it has")
    return p


def _ask(args, since: float, keep: Sequence[str] = ()) -> api.Statuses:
    """`since`: when the waiting began (time.monotonic). A busy computer may have taken its time until here."""
    left_s = api.ASK_S - (time.monotonic() - since)
    return api.status(args.jobs, all_jobs=args.all, ask_all_nodes=args.rescan, keep=keep, start=here(),
                      timeout_s=max(_LEAST_S, left_s))


def _draw(args, found: api.Statuses) -> None:
    for node, why in found.unreachable.items():
        tell(f"{node} could not be asked: {views.first_line(why).removeprefix(f'{node}: ')}")
    for note in found.notes:
        tell(note)
    if args.json:
        print(views.as_json([job.to_json() for job in found.jobs]))
    elif found.jobs:
        print(views.status_table(found.jobs, columns()))
    else:
        print("no jobs are running; launch status --all shows the ended ones" if found.more_ended
              else "no job is known here; launch status --rescan asks every node")


def _watch(args) -> None:
    keep: list[str] = []
    while True:
        shown = _ask(args, time.monotonic(), keep)  # the old picture stands until the new one is there
        if sys.stdout.isatty() and not args.json:
            print(_HOME_AND_CLEAR, end="", flush=True)
        _draw(args, shown)
        sys.stdout.flush()
        keep = [job.id for job in shown.jobs]
        args.rescan = False
        time.sleep(_EVERY_S)
