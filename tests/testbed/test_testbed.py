"""The test bed is what it claims to be; without this, a green test on top of it proves nothing."""
from __future__ import annotations

import os
import subprocess
import sys
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import pytest
import yaml

from .bed import NODES, TestbedError, as_root, poll
from .clients import client_config, ssh_agent
from .fixtures import leftovers, need
from .testbed import Testbed

WHERE = 'echo "$USER $(hostname)"'


def ssh(config: Path, host: str, command: str, **env: str) -> subprocess.CompletedProcess[str]:
    argv = ["ssh", "-F", str(config), "-o", "BatchMode=yes", "-o", "ConnectTimeout=1", host, command]
    return subprocess.run(argv, capture_output=True, text=True, timeout=20, env={**os.environ, **env})


def on_all(bed: Testbed, line: str, user: str | None = None) -> list[str]:
    with ThreadPoolExecutor(len(NODES)) as pool:
        return list(pool.map(lambda node: bed.sh(node, line, user=user).strip(), NODES))


def test_each_node_is_a_machine_of_its_own(testbed: Testbed) -> None:
    assert on_all(testbed, "hostname") == list(NODES)
    host_key = "/etc/ssh/ssh_host_ed25519_key.pub"
    for identity in ("/proc/sys/kernel/random/boot_id", "/etc/machine-id", host_key):
        assert len(set(on_all(testbed, f"cat {identity}"))) == len(NODES)
    for namespace in ("net", "uts", "pid", "mnt", "ipc", "cgroup"):
        assert len(set(on_all(testbed, f"readlink /proc/self/ns/{namespace}"))) == len(NODES)


def test_a_file_on_one_node_is_on_no_other(testbed: Testbed) -> None:
    places = ("/tmp", "/dev/shm", "/run", "/root", "/etc", "/var/tmp", "/scratch")
    files = " ".join(f"{place}/only-here" for place in places)
    testbed.sh("gpu01", f"touch {files}")
    count = f"ls {files} 2>/dev/null | wc -l"
    assert on_all(testbed, count) == ["0", str(len(places)), "0", "0", "0", "0"]
    assert not any(map(os.path.exists, files.split()))
    testbed.sh("gpu01", f"rm {files}")


def test_a_node_sees_only_its_own_processes_and_init_reaps(testbed: Testbed) -> None:
    testbed.sh("gpu01", "setsid sleep 4321 >/dev/null 2>&1 &", user="alice")
    assert poll(lambda: any("sleep 4321" in line for line in testbed.processes()))
    assert [line.split()[0] for line in testbed.processes() if "sleep 4321" in line] == ["gpu01"]
    counts = on_all(testbed, "ps -e -o args | grep -c '^sleep 4321' || true")
    assert counts == ["0", "1", "0", "0", "0", "0"]
    testbed.sweep()
    assert poll(lambda: testbed.sh("gpu01", "ps -e -o stat= | grep -c Z || true").strip() == "0")


def test_sweep_and_ps_know_the_users_apart(testbed: Testbed) -> None:
    testbed.sh("gpu02", "setsid sleep 4322 >/dev/null 2>&1 &", user="bob")
    assert poll(lambda: len(testbed.processes()) == 1)
    assert testbed.processes()[0].split()[2] == "bob"
    testbed.sweep()
    assert poll(lambda: not testbed.processes())


def test_ssh_reaches_every_node_as_each_user(testbed: Testbed) -> None:
    with ThreadPoolExecutor(len(NODES)) as pool:
        answers = list(pool.map(lambda node: ssh(testbed.ssh_config("alice"), node, WHERE).stdout, NODES))
    assert answers == [f"alice {node}\n" for node in NODES]
    for user in ("bob", "root"):
        assert ssh(testbed.ssh_config(user), "gpu05", WHERE).stdout == f"{user} gpu05\n"


def test_from_node_to_node(testbed: Testbed) -> None:
    assert testbed.exec("gpu01", "ssh", "gpu04", "hostname", user="bob").stdout == "gpu04\n"


def test_proxy_jump(testbed: Testbed) -> None:
    """`inner` has no way in but head, and head's switching off closes it."""
    config = testbed.ssh_config("alice")
    said = subprocess.run(["ssh", "-F", config, "-G", "inner"], capture_output=True, text=True).stdout
    assert "proxyjump head" in said and "proxycommand" not in said
    assert ssh(config, "inner", "hostname").stdout == "gpu05\n"
    with testbed.sshd_killed("head"):
        assert ssh(config, "inner", "hostname").returncode == 255
        assert ssh(config, "gpu05", "hostname").stdout == "gpu05\n"


FABRIC = """
import fabric, sys
config = fabric.Config(runtime_ssh_path=sys.argv[1])
connection = fabric.Connection(sys.argv[2], config=config)
print(connection.run("whoami; hostname", hide=True, in_stream=False).stdout)
"""


@pytest.mark.parametrize("host, name", [("gpu03", "gpu03"), ("inner", "gpu05")])
def test_fabric(testbed: Testbed, host: str, name: str) -> None:
    # A process of its own: paramiko leaves the ProxyCommand of a closed connection to the end of the process.
    argv = [sys.executable, "-c", FABRIC, str(testbed.ssh_config("alice")), host]
    assert subprocess.run(argv, capture_output=True, text=True, timeout=20).stdout.split() == ["alice", name]


def test_shared_home(testbed: Testbed) -> None:
    testbed.write("gpu01", "/home/alice/note", "hello", user="alice")
    assert on_all(testbed, "cat ~/note", user="alice") == ["hello"] * len(NODES)
    assert on_all(testbed, "stat -c %U /home/alice/note ~")[0] == "alice\nroot"
    testbed.exec("gpu02", "rm", "/home/alice/note", user="alice")


def test_private_home_in_a_bed_beside_the_first(testbed: Testbed, testbed_private_home: Testbed) -> None:
    private = testbed_private_home
    private.write("gpu01", "/home/alice/note", "hello", user="alice")
    assert on_all(private, "cat ~/note 2>/dev/null || true", user="alice") == ["", "hello", "", "", "", ""]
    assert on_all(testbed, "cat ~/note 2>/dev/null || true", user="alice") == [""] * len(NODES)
    assert ssh(private.ssh_config("alice"), "gpu01", "cat note").stdout == "hello"
    private.exec("gpu01", "rm", "/home/alice/note", user="alice")


def test_the_python_of_the_tests_works_on_a_node(testbed: Testbed) -> None:
    line = f"'{sys.executable}' -c 'import psutil, sys; print(sys.prefix)'"
    assert ssh(testbed.ssh_config("alice"), "gpu05", line).stdout.strip() == sys.prefix


def test_link_down_and_up(testbed: Testbed) -> None:
    config = testbed.ssh_config("alice")
    with testbed.link_down("gpu02"):
        assert ssh(config, "gpu02", "true").returncode == 255
        assert ssh(config, "gpu03", "true").returncode == 0
    assert ssh(config, "gpu02", "true").returncode == 0


def test_a_frozen_node_is_silent_and_goes_on(testbed: Testbed) -> None:
    config = testbed.ssh_config("alice")
    with testbed.frozen("gpu02"):
        answer = ssh(config, "gpu02", "true")
        assert answer.returncode == 255 and "timed out" in answer.stderr
    assert ssh(config, "gpu02", "true").returncode == 0


def test_power_cut(testbed: Testbed) -> None:
    boot = testbed.read("gpu04", "/proc/sys/kernel/random/boot_id")
    testbed.write("gpu04", "/scratch/kept", "x")
    testbed.write("gpu04", "/tmp/lost", "x")
    testbed.sh("gpu04", "setsid sleep 4323 >/dev/null 2>&1 &", user="alice")
    with testbed.power_cut("gpu04"):
        assert testbed.powered_off() == ["gpu04"]
        assert not testbed.processes()
        with pytest.raises(TestbedError, match="gpu04 is not running"):
            testbed.exec("gpu04", "true")
    assert testbed.read("gpu04", "/proc/sys/kernel/random/boot_id") != boot
    left = "ls /scratch/kept /tmp/lost 2>/dev/null || true; rm /scratch/kept"
    assert testbed.sh("gpu04", left).split() == ["/scratch/kept"]
    assert ssh(testbed.ssh_config("alice"), "gpu04", "hostname").stdout == "gpu04\n"


def test_sshd_killed_refuses(testbed: Testbed) -> None:
    config = testbed.ssh_config("alice")
    with testbed.sshd_killed("gpu02"):
        assert ssh(config, "gpu02", "true").returncode == 255
    assert ssh(config, "gpu02", "true").returncode == 0


def test_bad_networks(testbed: Testbed) -> None:
    reach = ["timeout", "0.4", "bash", "-c", "exec 3<>/dev/tcp/$0/22; read -ru 3 banner; echo $banner"]
    with testbed.partitioned("gpu03", "head"):
        assert testbed.exec("head", *reach, "gpu03", check=False).returncode == 124
        assert testbed.exec("gpu01", *reach, "gpu03").stdout.startswith("SSH-2.0")
    with testbed.packet_loss("gpu03", 100):
        assert testbed.exec("head", *reach, "gpu03", check=False).returncode == 124
    with testbed.slow_link("gpu03", delay_ms=250):  # the handshake alone takes 500 ms
        assert testbed.exec("head", *reach, "gpu03", check=False).returncode == 124
    assert testbed.exec("head", *reach, "gpu03").stdout.startswith("SSH-2.0")


def test_bad_disks(testbed: Testbed) -> None:
    with testbed.full_disk("gpu01", "/scratch/full") as place:
        with pytest.raises(TestbedError, match="No space left"):
            testbed.write("gpu01", f"{place}/file", "x" * 100, user="alice")
    with testbed.read_only("gpu01", "/scratch/fixed") as place:
        with pytest.raises(TestbedError, match="Read-only file system"):
            testbed.write("gpu01", f"{place}/file", "x", user="alice")
    testbed.write("gpu01", "/scratch/full/file", "x", user="root")
    testbed.exec("gpu01", "rm", "-r", "/scratch/full", "/scratch/fixed")


def test_memory_limit_kills(testbed: Testbed) -> None:
    eat = [sys.executable, "-c", "data = bytearray(300 << 20); print(len(data))"]
    with testbed.memory_limit("gpu01", "200M"):
        assert testbed.exec("gpu01", *eat, user="alice", check=False).returncode == 137
    assert testbed.exec("gpu01", *eat, user="alice").stdout.strip() == str(300 << 20)


def test_login_shell_and_bashrc(testbed: Testbed) -> None:
    config = testbed.ssh_config("alice")
    with testbed.login_shell("gpu01", "alice"):
        assert ssh(config, "gpu01", "echo $shell").stdout == "/bin/tcsh\n"
        assert ssh(config, "gpu02", "echo $BASH").stdout.endswith("/bash\n")
    with testbed.talking_bashrc("gpu01", "alice"):
        answer = ssh(config, "gpu01", "echo the answer")
        assert answer.stdout == "Welcome to gpu01! You have 3 new messages.\nalice@gpu01:~$ the answer\n"
        assert "quota" in answer.stderr
    assert ssh(config, "gpu01", "echo the answer").stdout == "the answer\n"


def test_conda(testbed: Testbed) -> None:
    line = '. "$1/etc/profile.d/conda.sh" && conda activate "$2" && echo "$CONDA_PREFIX" && python -c "$3"'
    code = "import os, psutil, sys; print(sys.prefix, os.environ['TEST_CONDA_ACTIVATED'])"
    with testbed.conda("gpu05", "alice", "mouse_facelift") as base:
        prefix, python = testbed.sh("gpu05", line, base, "mouse_facelift", code, user="alice").splitlines()
        assert prefix == f"{base}/envs/mouse_facelift"
        assert python == f"{prefix} 1" or sys.prefix == sys.base_prefix
        with pytest.raises(TestbedError, match="Could not find conda environment: other"):
            testbed.sh("gpu05", line, base, "other", code, user="alice")
    assert testbed.sh("gpu05", "ls", user="alice") == ""


def test_without_python(testbed: Testbed) -> None:
    line = f"command -v python3 python; '{sys.executable}' -V"
    with testbed.without_python("gpu05"):
        answer = ssh(testbed.ssh_config("alice"), "gpu05", line)
        assert answer.stdout == "" and answer.returncode == 127
    assert ssh(testbed.ssh_config("alice"), "gpu05", line).stdout.startswith(("/usr", "Python"))


def test_known_hosts(testbed: Testbed, tmp_path: Path) -> None:
    unknown = client_config(testbed, "alice", tmp_path, unknown=["gpu01"])
    assert "No ED25519 host key is known for 10.77.0.11" in ssh(unknown, "gpu01", "true").stderr
    assert ssh(unknown, "gpu02", "true").returncode == 0
    wrong = client_config(testbed, "alice", tmp_path, wrong_key=["gpu01"])
    assert "REMOTE HOST IDENTIFICATION HAS CHANGED" in ssh(wrong, "gpu01", "true").stderr
    with testbed.new_host_key("gpu01"):
        assert "IDENTIFICATION HAS CHANGED" in ssh(testbed.ssh_config("alice"), "gpu01", "true").stderr
    assert ssh(testbed.ssh_config("alice"), "gpu01", "true").returncode == 0


def test_agent_and_include(testbed: Testbed, tmp_path: Path) -> None:
    config = client_config(testbed, "bob", tmp_path, agent_only=True, include=True)
    assert "Permission denied" in ssh(config, "gpu01", "true", SSH_AUTH_SOCK="").stderr
    with ssh_agent(testbed, "bob", tmp_path) as env:
        assert ssh(config, "gpu01", "whoami", **env).stdout == "bob\n"


def test_sshd_options(testbed: Testbed) -> None:
    with testbed.sshd_options("gpu01", "DenyUsers alice"):
        assert ssh(testbed.ssh_config("alice"), "gpu01", "true").returncode == 255
        assert ssh(testbed.ssh_config("bob"), "gpu01", "true").returncode == 0
    assert ssh(testbed.ssh_config("alice"), "gpu01", "true").returncode == 0


def test_what_a_test_leaves_is_found_and_removed(testbed: Testbed) -> None:
    mounts = Counter(testbed.mounts())
    testbed.sh("gpu01", "setsid sleep 4325 >/dev/null 2>&1 &", user="bob")
    testbed.fault("gpu02", "readonly", "/mnt")
    testbed.fault("gpu03", "poweroff")
    found = leftovers(testbed, mounts, patience_s=0.1)
    testbed.fault("gpu02", "unmount", "/mnt")
    assert "gpu03 is switched off" in found and "mount: gpu02 /mnt" in found
    assert any(line.startswith("process: gpu01") and "sleep 4325" in line for line in found)
    assert not leftovers(testbed, mounts)


def test_cluster_yaml(testbed: Testbed, tmp_path: Path) -> None:
    path = testbed.cluster_yaml(tmp_path / "c.yaml", "bob", ["gpu01", "inner"], "/scratch/bob/l", gpus="auto")
    cluster = yaml.safe_load(path.read_text())
    assert cluster["ssh_config"] == str(testbed.ssh_config("bob"))
    inner = cluster["nodes"]["inner"]
    assert inner["workdir"] == "/scratch/bob/l" and inner["env"] == {"python": sys.executable}
    assert (inner["via"], inner["host"], inner["gpus"]) == ("ssh", "inner", "auto")


@pytest.mark.testbed
def test_down_leaves_nothing_and_up_repairs(tmp_path: Path) -> None:
    bed = need(Testbed(f"repair-{os.getpid()}"))
    try:
        bed.up()
        for line in bed.script("status").stdout.splitlines()[:2]:  # two machines die behind the script's back
            as_root(["kill", "-9", line.split()[-1]])
        bed.up()
        assert on_all(bed, "hostname") == list(NODES)
        client = subprocess.Popen(["ssh", "-F", str(bed.ssh_config("bob")), "gpu01", "sleep 4324"], stderr=-3)
        assert poll(lambda: any("sleep 4324" in line for line in bed.processes()))
    finally:
        bed.down()
    assert client.wait(5) == 255
    assert not bed.root.exists()
    assert bed.name not in Path("/proc/self/mountinfo").read_text()
    assert not list(Path("/sys/fs/cgroup").glob(f"**/*{bed.name}"))
    commands = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    assert bed.name not in commands and "sleep 4324" not in commands


def test_a_bed_whose_owner_died_is_removed_by_the_next_up(testbed: Testbed) -> None:
    abandoned = Testbed(f"abandoned-{os.getpid()}")
    with subprocess.Popen(["sleep", "60"]) as owner:
        abandoned.owner = owner.pid
        abandoned.up()
        owner.kill()
    testbed.up()
    assert not abandoned.root.exists()
    assert testbed.powered_off() == []
