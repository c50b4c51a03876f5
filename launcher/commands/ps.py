"""launch ps: what runs on a node."""
from __future__ import annotations

from collections.abc import Sequence

from launcher import api, node_views, views
from launcher.commands._common import columns, here, parser, tell


def run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    found = api.processes(args.node, start=here())
    if args.json:
        print(views.as_json(found))
    elif found:
        print(node_views.processes_text(found, columns()))
        if mine := next((one for one in found if one["mine"] and not one["job"]), None):
            tell(f"one of your own becomes a job: launch adopt {args.node}:{mine['pid']} --name X")
    else:
        print(f"nothing is on the GPUs of {args.node}, and you run no program there")
    return 0


def _parser():
    p = parser("ps", "Every process on a GPU of the node: whose, since when, how much memory, which of our jobs. Then "
                     "your own programs there that use no GPU. Those without a job can be adopted.")
    p.add_argument("node", nargs="?", default="local", metavar="NODE",
                   help="a node of cluster.yaml; default: local, this computer")
    p.add_argument("--json", action="store_true", help="a list of objects")
    return p
