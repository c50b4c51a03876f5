"""launch nodes: the machines, and whose their GPUs are."""
from __future__ import annotations

import sys
import time
from collections.abc import Sequence

from launcher import api, node_views, views
from launcher.commands._common import columns, here, parser, tell

_EVERY_S = 2.0
_HOME_AND_CLEAR = "\x1b[H\x1b[J"


def run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    if not args.watch:
        _draw(api.nodes(start=here()), args.json)
        return 0
    try:
        while True:
            found = api.nodes(start=here())  # the old picture stands until the new one is there
            if sys.stdout.isatty() and not args.json:
                print(_HOME_AND_CLEAR, end="", flush=True)
            _draw(found, args.json)
            sys.stdout.flush()
            time.sleep(_EVERY_S)
    except KeyboardInterrupt:
        tell("")
        return 130


def _draw(found: Sequence[api.NodeReport], as_json: bool) -> None:
    if as_json:
        print(views.as_json([report.to_json() for report in found]))
    else:
        print(node_views.nodes_text(found, columns()))


def _parser():
    p = parser("nodes", "Every node: GPUs with memory, use and whose processes are on them, disk, load and your jobs; "
                        "of a SLURM cluster its partitions. What does not answer in 3 s is shown as not known.")
    p.add_argument("--watch", action="store_true", help="draw it again every 2 s until Ctrl-C")
    p.add_argument("--json", action="store_true", help="a list of objects")
    return p
