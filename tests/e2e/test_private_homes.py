"""Nodes whose /home is their own: the same paths hold different jobs, and each is asked about its own."""
from __future__ import annotations

from pathlib import Path

from tests.testbed.testbed import Testbed

from .lab import Lab


def test_two_nodes_with_the_same_paths(testbed_private_home: Testbed, project: Path, tmp_path: Path) -> None:
    bed = testbed_private_home
    home = tmp_path / "laptop"
    home.mkdir()
    lab = Lab(project, home, "gpu01", bed.cluster_yaml(home / "cluster.yaml", "bob", ["gpu01", "gpu02"], "~/launch"))
    jobs = {node: lab.submit("--node", node, "--name", f"on {node}", "--", "hostname") for node in ("gpu01", "gpu02")}
    lab.launch("wait", *jobs.values())
    for node, job in jobs.items():
        assert lab.logs(job) == f"{node}\n"
        assert bed.exec(node, "ls", "launch/runs", user="bob").stdout.split() == [job]
    (home / "state" / "index.sqlite").unlink()
    table = lab.launch("status", "--rescan", "--all").stdout
    assert all(f"on {node}" in table for node in jobs)
