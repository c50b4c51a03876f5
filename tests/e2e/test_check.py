"""`launch check` of a node that ssh reaches, and of a SLURM cluster that can never give what is asked for."""
from __future__ import annotations

import json

from jobs.data import toy
from tests.testbed.slurmbed import SlurmBed

from .lab import Lab

PHASE3 = ("check", "phase3", "--config", "demo", "--json", "--set", "training.dataset.path=/home/alice/toy/data_train.txt",
          "--set", "training.validation.path=/home/alice/toy/data_val.txt")


def test_a_node_and_a_cluster_are_asked_and_nothing_stays(slurm: Lab, slurm_bed: SlurmBed) -> None:
    there = slurm_bed.root / "home/alice/toy"
    toy.make(there, samples=2, val=1, size=16, seed=0)
    slurm_bed.sh("head", "chown -R alice: /home/alice/toy")
    try:
        node = json.loads(slurm.launch(*PHASE3, "--node", "gpu05", "--gpus", "0").stdout)
        assert node["ok"] and node["imports"]["torch"] > 0
        (there / next(there.glob("*/opencv_cameras.json"))).unlink()
        cluster = json.loads(slurm.launch(*PHASE3, "--node", "lab", "--gpus", "9", "--quick", code=4).stdout)
    finally:
        slurm_bed.sh("head", "rm -r /home/alice/toy")
    told = {one["check"]: one["what"] for one in cluster["found"] if one["severity"] == "error"}
    assert "no nodes for so much at once" in told["submit"] and "have no opencv_cameras.json" in told["lists"]
    assert slurm_bed.sh("head", "ls -A /home/alice/launch/runs").strip() == "" and not slurm_bed.queue("alice")
    assert slurm_bed.sh("head", "ls -A /home/alice/launch/.launch | grep check || true").strip() == ""
