"""Questions to real sshds: the person's ssh configuration, keys, faults. Each failure is one clear message.
"""
from __future__ import annotations

import os
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import pytest

from cluster.backends.base import Backend
from cluster.backends.host import HostBackend
from cluster.errors import ClusterError, Refused, Unreachable, Unusable
from cluster.inventory import Node
from cluster.spec import CodeRef, PythonEnv
from tests.cluster.jobs import archive, command
from tests.helpers import wait_until
from tests.testbed.clients import client_config, open_master, ssh_agent
from tests.testbed.testbed import Testbed

pytestmark = pytest.mark.testbed

NODE = "gpu05"
FRESH_CLIENT = """
import sys, threading
from cluster.backends.base import backend_for
from cluster.inventory import Node
found = []
def ask(name):
    found.append(backend_for(Node(name, workdir=sys.argv[2], ssh_config=sys.argv[1])).prepare()["hostname"])
threads = [threading.Thread(target=ask, args=(f"gpu0{n}",)) for n in range(1, 6)]
for thread in threads: thread.start()
for thread in threads: thread.join()
print(*sorted(found))
"""
Connect = Callable[..., Backend]


@contextmanager
def connections(testbed: Testbed, tmp_path: Path) -> Iterator[Connect]:
    """Backends for a node as alice sees it; every job of theirs is ended with the test."""
    opened: list[HostBackend] = []
    workdir = f"/scratch/alice/{tmp_path.name} 작업"

    def make(name: str = NODE, config: Path | None = None, **more: Any) -> Backend:
        opened.append(HostBackend(Node(**{
            "name": name, "workdir": workdir, "ssh_config": str(config or testbed.ssh_config("alice")),
            "python": PythonEnv("python", sys.executable), **more})))
        return opened[-1]

    yield make
    for backend in opened:
        try:
            for view in backend.status(None)["jobs"]:
                backend.kill(view["run_dir"], "the test", now=True)
        except ClusterError:
            pass  # this backend was made to fail
        backend.close()
    testbed.sh(NODE, "rm -rf /scratch/alice/*")


@pytest.fixture
def connect(testbed: Testbed, tmp_path: Path) -> Iterator[Connect]:
    with connections(testbed, tmp_path) as make:
        yield make


@pytest.fixture(params=["fabric", "the ssh program"])
def either(request: pytest.FixtureRequest, testbed: Testbed, tmp_path: Path) -> Iterator[Connect]:
    """`connect` by each of the two clients; the second through a connection that only it can use."""
    with ExitStack() as opened:
        how = {}
        if request.param != "fabric":
            how = {"config": opened.enter_context(open_master(testbed, "alice", NODE, tmp_path)), "ssh_client": "openssh"}
        yield partial(opened.enter_context(connections(testbed, tmp_path)), **how)


def written(backend: Backend, run_dir: str, **how: Any) -> bytes:
    return b"".join(body for _, body in backend.logs(run_dir, **how))


def streams(testbed: Testbed) -> str:
    """The agents on the node that serve a log."""
    return testbed.exec(NODE, "pgrep", "-u", "alice", "-f", "stream ==", check=False).stdout


def said_by(error: pytest.ExceptionInfo[ClusterError]) -> str:
    assert "Traceback" not in str(error.value)
    return str(error.value)


def test_a_job_over_ssh_from_submit_to_restart(either: Connect) -> None:
    backend = either()
    assert backend.prepare()["hostname"] == NODE
    spec = command("sh", "-c", "echo \"$1\"; sleep 60", "sh", "a 'b'; 생쥐", node=NODE)
    run = backend.submit(spec, "a: 1\n", {})
    assert backend.submit(spec, "a: 1\n", {}) == run
    wait_until(lambda: written(backend, run["run_dir"]) == "a 'b'; 생쥐\n".encode())
    told = backend.kill(run["run_dir"], "me@here", grace_s=5)
    assert (told["state"], told["survivors"]) == ("CANCELLED", [])
    assert backend.restart(run["run_dir"], "me@here")["attempt"] == 1
    assert backend.show(run["run_dir"])["view"]["attempt"] == 1


def test_a_log_is_followed_to_its_last_byte(either: Connect) -> None:
    backend = either()
    script = "head -c 3000000 /dev/urandom | tee sent; sleep 0.3; printf end | tee -a sent"
    run = backend.submit(command("sh", "-c", script, node=NODE), None, {})
    frames = list(backend.logs(run["run_dir"], follow=True))
    assert frames[-1][0]["end"]["state"] == "COMPLETED"
    received = b"".join(body for _, body in frames)
    assert len(received) == 3000003 and received.endswith(b"end")


def test_code_travels_over_ssh(either: Connect) -> None:
    backend = either()
    code = archive(("data", os.urandom(5_000_000), ""), ("say.sh", b"#!/bin/sh\nwc -c < data\n", ""))
    spec = command("./say.sh", node=NODE, code=CodeRef("abc"))
    run = backend.submit(spec, None, {}, code)
    assert written(backend, run["run_dir"], follow=True).strip() == b"5000000"
    assert backend.submit(spec, None, {}, code) == run


def test_a_client_that_is_gone_leaves_the_job_and_nothing_else(connect: Connect, testbed: Testbed) -> None:
    backend = connect()
    run = backend.submit(command("sh", "-c", "echo here; sleep 60", node=NODE), None, {})
    frames = backend.logs(run["run_dir"], follow=True)
    assert next(frames)[1] == b"here\n"
    assert streams(testbed)
    backend.close()
    wait_until(lambda: not streams(testbed))
    with pytest.raises(Unreachable, match="the connection broke"):
        next(frames)
    assert connect().status([run["run_dir"]])["jobs"][0]["state"] == "RUNNING"


def test_a_cut_cable_is_noticed_and_the_reader_goes_on_where_it_was(
        either: Connect, testbed: Testbed, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("cluster.remote.SILENCE_S", 2.0)
    backend = either()
    run = backend.submit(command("sh", "-c", "echo one; sleep 4; echo two", node=NODE), None, {})
    seen: dict[str, int] = {}
    frames = backend.logs(run["run_dir"], follow=True)
    first, body = next(frames)
    seen[first["f"]] = first["next"]
    with testbed.frozen(NODE), pytest.raises(Unreachable, match="no answer for 2 s"):
        next(frames)
    backend.close()
    assert body + written(either(), run["run_dir"], follow=True, offsets=seen) == b"one\ntwo\n"


def test_an_unknown_key_is_refused_with_the_command_to_accept_it(
        connect: Connect, testbed: Testbed, tmp_path: Path) -> None:
    config = client_config(testbed, "alice", tmp_path, unknown=[NODE])
    with pytest.raises(Unreachable, match="not known yet") as caught:
        connect(config=config).prepare()
    assert f"ssh -F {config} {NODE}" in said_by(caught) and "SHA256:" in said_by(caught)
    known = tmp_path / "known_hosts"
    assert f">> {known}" in said_by(caught)
    known.write_text(known.read_text() + testbed.read(NODE, "/etc/ssh/ssh_host_ed25519_key.pub").join(
        [address_of(testbed) + " ", ""]))
    assert connect(config=config).prepare()["hostname"] == NODE


def address_of(testbed: Testbed) -> str:
    config = testbed.ssh_config("alice").read_text().splitlines()
    return config[config.index(f"Host {NODE}") + 1].split()[1]


def test_a_changed_key_is_refused_loudly(connect: Connect, testbed: Testbed, tmp_path: Path) -> None:
    config = client_config(testbed, "alice", tmp_path, wrong_key=[NODE])
    with pytest.raises(Unreachable, match="HOST KEY HAS CHANGED") as caught:
        connect(config=config).prepare()
    lines = (tmp_path / "known_hosts").read_text().splitlines()
    number = 1 + next(n for n, text in enumerate(lines) if text.startswith(NODE))
    assert f"{tmp_path}/known_hosts:{number}" in said_by(caught) and "ssh-keygen -R" in said_by(caught)
    with testbed.new_host_key(NODE), pytest.raises(Unreachable, match="HAS CHANGED"):
        connect().prepare()


def test_hashed_names_and_several_keys_in_known_hosts(
        connect: Connect, testbed: Testbed, tmp_path: Path) -> None:
    config = client_config(testbed, "alice", tmp_path)
    known = tmp_path / "known_hosts"
    subprocess.run(["ssh-keygen", "-q", "-H", "-f", known], check=True, capture_output=True)
    assert NODE not in known.read_text()
    assert connect(config=config).prepare()["hostname"] == NODE
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", tmp_path / "other"], check=True)
    other = (tmp_path / "other.pub").read_text()
    known.write_text(f"{address_of(testbed)} {other}" + known.read_text())
    assert connect(config=config).prepare()["hostname"] == NODE
    right = testbed.read(NODE, "/etc/ssh/ssh_host_ed25519_key.pub")
    known.write_text(f"@revoked * {right}" + known.read_text())
    with pytest.raises(Unreachable, match=r"revoked in .*known_hosts:1"):
        connect(config=config).prepare()


def test_include_and_host_key_alias(connect: Connect, testbed: Testbed, tmp_path: Path) -> None:
    including = client_config(testbed, "alice", tmp_path, include=True)
    assert connect(config=including).prepare()["hostname"] == NODE
    alias = tmp_path / "alias"
    alias.write_text(f"Host box\n  HostName {address_of(testbed)}\n  HostKeyAlias {NODE}\n"
                     f"Host box\n  ProxyCommand {proxy_command(testbed)}\n  Include {including}\n"
                     f"Host *\n  User alice\n  IdentityFile {testbed.root}/ssh/id_alice\n"
                     f"  UserKnownHostsFile {testbed.root}/ssh/known_hosts\n")
    assert connect("box", config=alias).prepare()["hostname"] == NODE


def proxy_command(testbed: Testbed) -> str:
    lines = testbed.ssh_config("alice").read_text().splitlines()
    return next(line.split(None, 1)[1] for line in lines if line.strip().startswith("ProxyCommand"))


def test_through_a_jump_host(connect: Connect, testbed: Testbed) -> None:
    inner = connect("inner")
    assert inner.prepare()["hostname"] == NODE
    run = inner.submit(command("echo", "through", node="inner"), None, {})
    assert written(inner, run["run_dir"], follow=True) == b"through\n"
    with testbed.sshd_killed(NODE), pytest.raises(Unreachable, match="head: from there .* cannot be reached"):
        connect("inner").prepare()
    with testbed.sshd_killed("head"), pytest.raises(Unreachable, match="inner: head: .*refused"):
        connect("inner").prepare()


def test_a_key_that_only_the_agent_has(
        connect: Connect, testbed: Testbed, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    config = client_config(testbed, "alice", tmp_path, agent_only=True)
    with pytest.raises(Unreachable, match="does not let alice in") as caught:
        connect(config=config).prepare()
    assert f"try: ssh -F {config} {NODE}" in said_by(caught) and caught.value.exit_code == 3
    with ssh_agent(testbed, "alice", tmp_path) as env:
        monkeypatch.setenv("SSH_AUTH_SOCK", env["SSH_AUTH_SOCK"])
        assert connect(config=config).prepare()["user"] == "alice"
        monkeypatch.delenv("SSH_AUTH_SOCK")
        config.write_text(f"IdentityAgent {env['SSH_AUTH_SOCK']}\n" + config.read_text())
        assert connect(config=config).prepare()["user"] == "alice"


def test_a_key_with_a_passphrase_is_named_and_never_asked_for(
        connect: Connect, testbed: Testbed, tmp_path: Path) -> None:
    key = tmp_path / "locked"
    subprocess.run(["ssh-keygen", "-q", "-t", "ed25519", "-N", "secret", "-f", key], check=True)
    config = client_config(testbed, "alice", tmp_path, agent_only=True)
    config.write_text(f"IdentityFile {key}\n" + config.read_text())
    with pytest.raises(Unreachable, match=f"ssh-add {key}"):
        connect(config=config).prepare()


def test_a_login_shell_that_is_not_posix_and_one_that_talks(connect: Connect, testbed: Testbed) -> None:
    with testbed.login_shell(NODE, "alice", "/bin/tcsh"):
        backend = connect()
        run = backend.submit(command("echo", "$HOME !! `x`", node=NODE), None, {})
        assert written(backend, run["run_dir"], follow=True) == b"$HOME !! `x`\n"
        backend.close()
    with testbed.talking_bashrc(NODE, "alice"):
        assert connect().status([run["run_dir"]])["jobs"][0]["state"] == "COMPLETED"


def test_no_python_on_the_node(connect: Connect, testbed: Testbed) -> None:
    with testbed.without_python(NODE), pytest.raises(Unusable, match="no Python >= 3.10") as caught:
        connect().prepare()
    assert "agent_python" in said_by(caught) and caught.value.exit_code == 2


@pytest.mark.parametrize("fault", ["full_disk", "read_only"])
def test_a_workdir_that_takes_nothing(connect: Connect, testbed: Testbed, fault: str) -> None:
    directory = "/scratch/alice/broken"
    with getattr(testbed, fault)(NODE, directory):
        with pytest.raises(Refused, match="No space left|Read-only file system") as caught:
            connect(workdir=directory).submit(command("true", node=NODE), None, {})
        assert "workdir" in said_by(caught) and caught.value.exit_code == 4
        assert testbed.sh(NODE, f"ls -A {directory}/runs 2>/dev/null || true") == ""


def test_a_node_that_is_down_hangs_or_refuses(connect: Connect, testbed: Testbed, tmp_path: Path) -> None:
    config = client_config(testbed, "alice", tmp_path)
    config.write_text("ConnectTimeout 1\n" + config.read_text())

    def fails(words: str) -> None:
        begun = time.monotonic()
        with pytest.raises(Unreachable, match=words) as caught:
            connect(config=config).status(None, timeout_s=3.0)
        said_by(caught)
        assert time.monotonic() - begun < 15

    with testbed.sshd_killed(NODE):
        fails("refused")
    with testbed.link_down(NODE):
        fails("sshd does not answer|No route|timed out")
    with testbed.frozen(NODE):
        fails("sshd does not answer")
    assert connect(config=config).prepare()["hostname"] == NODE


def test_a_name_that_does_not_exist(connect: Connect, tmp_path: Path) -> None:
    (tmp_path / "config").write_text("Host none\n  HostName no-such-host.invalid\n")
    with pytest.raises(Unreachable, match="'no-such-host.invalid' is not known") as caught:
        connect("none", config=tmp_path / "config").prepare()
    assert caught.value.exit_code == 3
    (tmp_path / "config").write_text("Prot 22\n")
    with pytest.raises(Unusable, match="does not accept its configuration"):
        connect("none", config=tmp_path / "config").prepare()


def test_many_at_once_through_an_sshd_that_drops_some(connect: Connect, testbed: Testbed) -> None:
    connect().prepare()
    with testbed.sshd_options(NODE, "MaxStartups 2:60:4"):
        answers: list[Any] = []

        def ask() -> None:
            try:
                answers.append(connect().prepare()["hostname"])
            except ClusterError as error:
                answers.append(error)

        threads = [threading.Thread(target=ask) for _ in range(6)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    assert answers == [NODE] * 6


def test_many_nodes_at_once_from_a_fresh_client(testbed: Testbed, tmp_path: Path) -> None:
    """The libraries are loaded by many threads at the same moment."""
    done = subprocess.run(
        [sys.executable, "-c", FRESH_CLIENT, str(testbed.ssh_config("alice")), "~/launch-of-the-test"],
        cwd=Path(__file__).parents[2], capture_output=True, text=True)
    testbed.sh("head", "rm -rf /home/alice/launch-of-the-test")
    assert (done.stdout.split(), done.stderr) == (["gpu01", "gpu02", "gpu03", "gpu04", "gpu05"], "")


def test_the_ssh_program_instead(connect: Connect, testbed: Testbed, tmp_path: Path) -> None:
    backend = connect(ssh_client="openssh")
    run = backend.submit(command("sh", "-c", "head -c 500000 /dev/zero; printf end", node=NODE), None, {})
    log = written(backend, run["run_dir"], follow=True)
    assert len(log) == 500003 and log.endswith(b"end")
    config = client_config(testbed, "alice", tmp_path, wrong_key=[NODE])
    with pytest.raises(Unreachable, match="does not trust") as changed:
        connect(config=config, ssh_client="openssh").prepare()
    assert "HAS CHANGED" in said_by(changed)
    config = client_config(testbed, "alice", tmp_path, agent_only=True)
    with pytest.raises(Unreachable, match="Permission denied") as denied:
        connect(config=config, ssh_client="openssh").prepare()
    assert f"try: ssh -F {config} {NODE}" in said_by(denied)


def test_files_that_the_node_sees_too(connect: Connect, tmp_path: Path) -> None:
    here = Path(__file__)
    (tmp_path / "only here").write_text("x")
    only_here = str(tmp_path / "only here")
    stats = connect().prepare(stat=[str(here), only_here])["stats"]
    info = here.stat()
    assert stats == {str(here): [info.st_ino, info.st_size, info.st_mtime_ns], only_here: None}
