"""launch check: what would go wrong, before anything is started."""
from __future__ import annotations

from collections.abc import Sequence

from launcher import api, check_groups, views
from launcher.commands._common import count, here, parser, positive, seconds
from launcher.stages import Request

SHARED = "shared"
REFUSED = 4


def run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    found = api.check(_request(args), deep=not args.quick)
    print(views.as_json(check_groups.as_object(found)) if args.json else check_groups.as_text(found))
    return REFUSED if found.bad else 0


def _request(args) -> Request:
    return Request(
        start=here(), stage=args.stage, node=args.node, nodes=args.nodes, gpus=1 if args.gpus == SHARED else args.gpus,
        share=args.gpus == SHARED, config=args.config, sets=tuple(args.set), resume=args.resume,
        time_s=seconds("--time", args.time), sweeps=tuple(args.sweep))


def _parser():
    p = parser("check", "Look at a stage as a submit would, and deeper: packages, GPUs, samples, rigs, checkpoints, "
                        "memory, disk and time. Starts nothing.")
    p.epilog = "Exit code 4 when there is an error. docs/check.md explains each finding."
    p.add_argument("stage", metavar="STAGE", help="a file of configs/stages, as in phase3; of a pipeline each stage")
    p.add_argument("--node", default="local", metavar="N", help="where it would run, as for submit; default: local")
    p.add_argument("--nodes", type=positive, metavar="N", help="machines that are one torchrun world")
    p.add_argument("--gpus", type=lambda text: text if text == SHARED else count(text), metavar="N|shared",
                   help="how many GPUs on each node; default: what the stage says")
    p.add_argument("--config", metavar="RUN", help="a run file by its name or path; default: the stage's own")
    p.add_argument("--set", action="append", default=[], metavar="A.B=V", help="change the config")
    p.add_argument("--sweep", action="append", default=[], metavar="A.B=V1,V2", help="look at every combination")
    p.add_argument("--resume", default="auto", metavar="auto|never|JOB|PATH", help="the checkpoint it would go on from")
    p.add_argument("--time", metavar="24h", help="its time limit")
    p.add_argument("--quick", action="store_true", help="only what a submit looks at: no imports, no pictures")
    p.add_argument("--json", action="store_true", help="one object")
    return p
