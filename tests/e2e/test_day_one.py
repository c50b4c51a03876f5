"""What a person does on the first day: write down the machines, look who is there, take over what runs already."""
from __future__ import annotations

import json
import shutil
from pathlib import Path

from configs.load import read_cluster
from tests.helpers import wait_until
from tests.testbed.clients import open_master
from tests.testbed.slurmbed import SlurmBed
from tests.testbed.testbed import Testbed

from .lab import Lab

TRAIN = """\
import os, subprocess, sys, time

worker = "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); time.sleep(999)"
held = [subprocess.Popen([sys.executable, "-c", worker], start_new_session=True).pid for _ in range(2)]
print("pids", os.getpid(), *held, "in", os.getcwd(), "seed", os.environ["SEED"], sys.argv[1:], flush=True)
for step in range(1, 10001):
    sys.stderr.write(f"\\r {step // 100}%|##   | {step}/10000 [00:01<00:09, 9.9it/s, loss={1 / step:.4f}]")
    sys.stderr.flush()
    time.sleep(0.05)
"""
MORE_HOSTS = "Host dead\n  HostName 127.0.0.1\n  Port 9\nHost github.com\n  User git\nHost *.lab\n  User somebody\n"


def table(stdout: str) -> dict[str, str]:
    """The line of each node."""
    return {line.split()[0]: line for line in stdout.splitlines() if line.strip()}


def there(bed: Testbed, node: str, pids: list[str]) -> list[str]:
    return bed.sh(node, 'for p; do [ ! -e /proc/$p ] || echo $p; done', *pids).split()


def said(bed: Testbed, log: Path) -> list[str]:
    """The words of the program's first line, once it is there."""
    return wait_until(lambda: log.exists() and b"\r" in log.read_bytes() and log.read_text().split("\n")[0].split(), 20,
                      "its first words")


def test_a_program_that_nohup_started_is_adopted(lab: Lab, testbed: Testbed) -> None:
    """Another login of the same person started it, hours ago."""
    old = testbed.root / "home/alice/old run"
    old.mkdir()
    (old / "train.py").write_text(TRAIN)
    testbed.exec("gpu05", "chown", "-R", "alice:", "/home/alice/old run")
    try:
        testbed.sh("gpu05", "cd '/home/alice/old run'; SEED=7 WANDB_API_KEY=geheim nohup python3 -u train.py 'a b' "
                   ">train.log 2>&1 </dev/null & echo $! >/tmp/old.pid", user="alice")
        _, pid, *workers = said(testbed, old / "train.log")[:4]
        programs = json.loads(lab.launch("ps", "gpu05", "--json").stdout)
        assert [(one["pid"], one["job"]) for one in programs if one["command"][-1] == "a b"] == [(int(pid), None)]

        adopted = lab.launch("adopt", f"gpu05:{pid}", "--name", "old")
        job = adopted.stdout.strip()
        assert "python3 -u train.py 'a b'" in adopted.stderr and "geheim" not in adopted.stderr
        view = wait_until(lambda: (found := lab.status(job))["step"] and found, 15, "its progress")
        assert (view["state"], view["total"], view["attempt"]) == ("RUNNING", 10000, 0) and view["loss"] < 1
        assert lab.logs("old").startswith(f"pids {pid} ")
        assert f"belongs to the job {job} already" in lab.launch("adopt", f"gpu05:{pid}", code=4).stderr
        assert "geheim" not in lab.launch("show", "old", "--json").stdout

        assert "freed 3 processes" in lab.launch("kill", "old", "--grace", "1s").stdout
        assert there(testbed, "gpu05", [pid, *workers]) == []

        lab.launch("restart", "old")
        first = said(testbed, lab.seen_here(lab.status(job)["run_dir"]) / "attempts/001/logs/rank-0.log")
        assert " ".join(first[4:]) == "in /home/alice/old run seed 7 ['a b']"
        lab.launch("kill", "--now", "old")
        assert there(testbed, "gpu05", first[1:4]) == []
    finally:
        testbed.sh("gpu05", 'kill -9 $(cat /tmp/old.pid) 2>/dev/null || true; rm -f /tmp/old.pid')
        shutil.rmtree(old)


def test_init_writes_down_what_ssh_reaches(testbed: Testbed, tmp_path: Path) -> None:
    """gpu03 wants a one-time code, which somebody has typed; a logout from gpu02 ends everything."""
    lab = Lab(tmp_path, tmp_path, extra_env={"XDG_CONFIG_HOME": str(tmp_path / "settings")})
    written = tmp_path / "settings/launch/cluster.yaml"
    logind = testbed.file("gpu02", "/etc/systemd/logind.conf.d/cluster.conf", "[Login]\nKillUserProcesses=yes\n")
    try:
        with open_master(testbed, "alice", "gpu03", tmp_path) as one_time, logind:
            config = tmp_path / "ssh config"
            plain = testbed.ssh_config("alice").read_text().replace("inner head gpu*", "inner head gpu* !gpu03")
            config.write_text(f"Match originalhost gpu03\n  Include {one_time}\n{plain}{MORE_HOSTS}")
            done = lab.launch("init", "--ssh-config", str(config), "--workdir", "/home/alice/launch")
            assert lab.submit_and_read("--node", "gpu03", "--cwd", "/", "--", "hostname") == "gpu03\n"
        rows, found = table(done.stdout), read_cluster(written)
        assert {name for name, node in found.nodes.items() if node.ssh.client == "fabric"} == {
            "head", "gpu01", "gpu02", "gpu04", "gpu05"}
        assert found.nodes["gpu03"].ssh.client == "openssh" and " openssh " in rows["gpu03"]
        assert "fabric: it does not let alice in" in written.read_text()
        assert "gpu03, head, gpu02, gpu04, gpu05" in rows["gpu01"] and "inner" not in rows["gpu01"]
        assert "no sshd runs there" in rows["dead"] and "git server" in rows["github.com"]
        assert "same machine as gpu05" in rows["inner"]
        assert "loginctl enable-linger" in rows["gpu02:"] and "gpu01:" not in rows
        assert not list((testbed.root / "home/alice/launch/.launch/seen-by").iterdir())

        nodes = {one["name"]: one for one in json.loads(lab.launch("nodes", "--json").stdout)}
        assert nodes["gpu05"]["reachable"] and nodes["gpu05"]["census"]["disk"]["free_bytes"] > 0
        assert not nodes["gpu03"]["reachable"] and "denied" in nodes["gpu03"]["problem"]  # nobody types a code
        assert "--force" in lab.launch("init", code=4).stderr
    finally:
        testbed.sh("head", "rm -rf /home/alice/launch")


def test_init_finds_a_slurm_cluster(slurm_bed: SlurmBed, tmp_path: Path) -> None:
    lab = Lab(tmp_path, tmp_path, extra_env={"XDG_CONFIG_HOME": str(tmp_path / "settings")})
    config = str(slurm_bed.ssh_config("alice"))
    output = tmp_path / "cluster.yaml"
    try:
        rows = table(lab.launch("init", "--ssh-config", config, "--output", str(output)).stdout)
        found = read_cluster(output)
        assert {name: (type(node).__name__, node.login) for name, node in found.nodes.items()} == {
            "testbed": ("SlurmNode", "head")}
        assert "--node testbed:gpu05" in rows["gpu05"]
        lab.cluster = output
        rows = table(lab.launch("nodes").stdout)
        assert "5 machines" in rows["testbed:main"] and " 40 " in rows["testbed:main"]
    finally:
        slurm_bed.sh("head", "rm -rf /home/alice/launch")
