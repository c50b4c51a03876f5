"""`make testbed`: a bed with SLURM for a person to try the launcher on; `make testbed-down` removes it."""
from __future__ import annotations

import sys

from .bed import as_root, unavailable
from .slurmbed import SlurmBed, not_installed

USAGE = """\
a SLURM cluster (login node head, gpu01 .. gpu05 with 8 pretended GPUs each) is up; cluster.yaml calls it lab

  export LAUNCH_CLUSTER={root}/cluster.yaml
  launch submit --node lab --gpus 2 -- hostname      # by SLURM; --node lab:low, lab:high: its other partitions
  launch submit --node bare -- hostname              # gpu05 by plain ssh
  launch status
  ssh -F {root}/ssh/config.alice head      # the login node itself: sbatch, squeue, sacct

make testbed-down removes it and all that was written on it"""


def main(action: str) -> int:
    if why_not := unavailable() or not_installed():
        print(why_not, file=sys.stderr)
        return 1
    bed = SlurmBed("main")
    bed.owner = None
    if action == "down":
        bed.down()
        return 0
    bed.up()
    text = bed.slurm_cluster("alice", ssh_nodes={"bare": "gpu05"})
    as_root(["tee", f"{bed.root}/cluster.yaml"], input=text)
    print(USAGE.format(root=bed.root))
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
