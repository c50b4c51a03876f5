"""The commands of the README are run as they stand there, on this computer and on a node of the test bed."""
from __future__ import annotations

import re
import shlex
from pathlib import Path

import pytest

from cluster.contract import RunDir
from configs.load import load_cluster, load_stage
from jobs.data import toy
from tests.e2e.lab import Lab
from tests.launcher.test_prune import checkpoint
from tests.testbed.slurmbed import SlurmBed
from tests.testbed.testbed import Testbed

REPOSITORY = Path(__file__).parents[1]
TRAIN_SCRIPT = "import sys; print('trained with', sys.argv[1:])\n"


def blocks(document: str, language: str) -> list[str]:
    return re.findall(rf"^```{language}\n(.*?)^```", (REPOSITORY / document).read_text(), re.M | re.S)


def commands(document: str = "README.md") -> list[list[str]]:
    lines = [line for block in blocks(document, "console") for line in block.splitlines()]
    return [shlex.split(line[2:]) for line in lines if line.startswith("$ ")]


def test_the_make_targets_exist() -> None:
    targets = set(re.findall(r"^([a-z-]+):", (REPOSITORY / "Makefile").read_text(), re.M))
    asked = set(re.findall(r"make ([a-z]+)\b", (REPOSITORY / "README.md").read_text())) - {"s"}
    assert {"demo", "install", "test", "campaign", "bench"} <= asked <= targets


def test_every_link_leads_somewhere() -> None:
    for document in ("README.md", *(f"docs/{path.name}" for path in (REPOSITORY / "docs").glob("*.md"))):
        for link in re.findall(r"\]\(([^)#]+)\)", (REPOSITORY / document).read_text()):
            assert ((REPOSITORY / document).parent / link).exists(), f"{document}: {link}"


def test_the_yaml_of_the_documents_is_valid(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    [cluster] = blocks("README.md", "yaml")
    (tmp_path / "cluster.yaml").write_text(cluster)
    monkeypatch.setenv("LAUNCH_CLUSTER", str(tmp_path / "cluster.yaml"))
    loaded = load_cluster(tmp_path)
    assert loaded and set(loaded.nodes) == {"gpu05"}
    [cluster] = blocks("docs/clusters.md", "yaml")
    (tmp_path / "cluster.yaml").write_text(cluster)
    loaded = load_cluster(tmp_path)
    assert loaded and set(loaded.nodes) == {"lab"}
    [stage] = blocks("docs/stages.md", "yaml")
    (tmp_path / "configs/stages").mkdir(parents=True)
    (tmp_path / "configs/stages/mine.yaml").write_text(stage)
    assert load_stage("mine", tmp_path)


def test_the_commands_of_the_readme(testbed: Testbed, tmp_path: Path) -> None:
    """In their order, standing in the checkout, with gpu05 as the node. `make demo` is the campaign's."""
    toy.make(testbed.root / "home/alice/data/demo", samples=2, val=1, size=32, seed=0)
    testbed.sh("gpu05", "mkdir -p /home/me && chmod 777 /home/me")
    testbed.write("gpu05", "/home/me/FaceLift/train_gslrm.py", TRAIN_SCRIPT, user="alice")
    cluster = testbed.cluster_yaml(tmp_path / "cluster.yaml", "alice", ["gpu05"], "/home/alice/launch",
                                   data="/home/alice/data")
    lab = Lab(REPOSITORY, tmp_path, "gpu05", cluster)
    try:
        for program, *argv in commands():
            if program == "make":
                continue
            assert program == "launch"
            said = lab.launch(*_as_here(argv, testbed, tmp_path))
            if argv[0] == "status":
                assert "RUNNING" in said.stdout or "PENDING" in said.stdout
        assert "trained with ['--config', 'b.yaml']" in lab.logs("x")
        restarted = lab.status("mouse")
        assert restarted["attempt"] == 1
        assert lab.status("old")["state"] == "RUNNING"
    finally:
        lab.launch("kill", "--now", "mouse", "old", code=None)
        testbed.sh("gpu05", "rm -rf /home/me /home/alice/launch /home/alice/data")


def _as_here(argv: list[str], testbed: Testbed, tmp_path: Path) -> list[str]:
    """The ssh configuration and the pid of the README are not those of this machine."""
    if argv[0] == "init":
        return [*argv, "--ssh-config", str(testbed.ssh_config("alice")), "--output", str(tmp_path / "written.yaml")]
    if argv[0] == "adopt":
        line = "cd /home/me/FaceLift; nohup sleep 600 >old.log 2>&1 </dev/null & echo $!"
        return ["adopt", f"gpu05:{testbed.sh('gpu05', line, user='alice').strip()}", *argv[2:]]
    return argv


def test_the_commands_of_the_slurm_page(slurm_bed: SlurmBed, tmp_path: Path) -> None:
    """In their order, from a laptop, on the SLURM of the test bed."""
    toy.make(slurm_bed.root / "home/alice/data/demo", samples=2, val=1, size=32, seed=0)
    (tmp_path / "cluster.yaml").write_text(slurm_bed.slurm_cluster("alice", data="/home/alice/data"))
    lab = Lab(REPOSITORY, tmp_path, "lab", tmp_path / "cluster.yaml", bed=slurm_bed)
    try:
        for _, *argv in commands("docs/clusters.md"):
            if argv[0] == "logs":
                lab.wait_state("mouse", "RUNNING", timeout_s=90)
            lab.launch(*argv, timeout_s=200)
        assert lab.logs("look") == "gpu05\n"
        assert {lab.status(name)["state"] for name in ("look", "quick")} == {"COMPLETED"}
    finally:
        lab.launch("kill", "--now", "mouse", code=None)
        slurm_bed.sh("head", "rm -rf /home/alice/launch /home/alice/data")


def test_the_commands_of_the_files_page(tmp_path: Path) -> None:
    """In their order, on this computer, of a job that has left an artifact and checkpoints."""
    (tmp_path / "here").mkdir()
    lab = Lab(tmp_path / "here", tmp_path)
    makes = 'echo loss 1; mkdir "$LAUNCH_RUN_DIR/artifacts/samples"; echo ok > "$LAUNCH_RUN_DIR/artifacts/samples/0.png"'
    job = lab.submit("--name", "mouse", "--", "sh", "-c", makes)
    lab.launch("wait", "mouse")
    for step in (1, 2, 3):
        checkpoint(RunDir(lab.run_dir(job)), step)
    said = [lab.launch(*argv).stdout for _, *argv in commands("docs/files.md")]
    assert said[0] == "loss 1\n" and "sha256 verified" in said[1] and "would free" in said[3]
    assert (tmp_path / "here/kept/checkpoints/step-00000003-a000/manifest.json").exists()
    assert f"{job} on local: freed" in said[4] and "keeps step-00000002-a000: among the newest 2" in said[4]
