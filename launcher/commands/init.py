"""launch init: a cluster.yaml of the machines that ssh and SLURM know."""
from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from launcher import api, init_views
from launcher.commands._common import here, parser, tell
from launcher.errors import Interrupted


def run(argv: Sequence[str]) -> int:
    args = _parser().parse_args(argv)
    try:
        done = api.init(start=here(), output=args.output, ssh_config=args.ssh_config, workdir=args.workdir,
                        force=args.force, tell=tell)
    except KeyboardInterrupt:
        raise Interrupted("\nnothing was written") from None
    print(init_views.table(done))
    for note in init_views.notes(done):
        print(note)
    tell(init_views.summary(done))
    return 0


def _parser():
    p = parser("init", "Write a cluster.yaml from the hosts of ~/.ssh/config and from SLURM's sinfo, and try every "
                       "node. Each is logged in to once; the workdir is made there.")
    p.add_argument("--output", type=Path, metavar="FILE",
                   help="default: the cluster.yaml that is in use here, else ~/.config/launch/cluster.yaml")
    p.add_argument("--ssh-config", metavar="FILE", help="another file than ~/.ssh/config; it is named in cluster.yaml")
    p.add_argument("--workdir", default="~/launch", metavar="DIR", help="on the nodes; default: ~/launch")
    p.add_argument("--force", action="store_true", help="also where there is a cluster.yaml; it becomes …yaml.before")
    return p
