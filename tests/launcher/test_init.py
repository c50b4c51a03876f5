"""`launch init`: what becomes of each host, and a file that loads whatever the hosts are called."""
from __future__ import annotations

import os
from pathlib import Path
from typing import Any

import pytest

from cluster.inventory import Node
from cluster.node import lingering
from cluster.sshconfig import host_names
from configs.load import read_cluster
from launcher import init
from launcher.discovery import Found
from launcher.errors import Refused
from launcher.init_views import notes, table

HERE = Node("local", via="local")
CONFIG = """\
Include {below}/*.conf
Host gpu05 gpu06 *.lab !bad
  User me
host="my node"
Host *
  ServerAliveInterval 5
Include missing
"""


def found(name: str, slurm: dict[str, Any] | None = None, **said: Any) -> Found:
    node = HERE if name == "local" else Node(name, host=name, **{key: said.pop(key) for key in ("ssh_client",) if key in said})
    about = {"hostname": name, "boot_id": name, "user": "me", "python": "3.11.2", "executable": "/usr/bin/python3",
             "psutil": True, "submitit": True, "gpus": [], "gpu_problem": "", "conda": [], "lingers": False,
             "kills_at_logout": None, "slurm": slurm, "token": "",
             "disk": {"free_bytes": 812e9, "total_bytes": 1e12, "free_inodes": 10**6, "path": "/"}, **said}
    return Found(name, node, about)


def unreached(name: str, **how: Any) -> Found:
    return Found(name, Node(name), problem="it did not answer", **{"reached": False, **how})


def slurm(*machines: str, cluster: str = "mice") -> dict[str, Any]:
    return {"cluster": cluster, "machines": list(machines), "partitions": ["main", "low"], "default": "main"}


def test_the_hosts_of_a_configuration(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    (tmp_path / "more" / "a.conf").write_text("Host first # old\n")
    (tmp_path / "config").write_text(CONFIG.format(below=tmp_path / "more"))
    assert host_names(str(tmp_path / "config")) == ["first", "gpu05", "gpu06", "my node"]


def test_a_file_that_loads_whatever_the_hosts_are_called(tmp_path: Path) -> None:
    hosts = [found("local"), found("gpu05", conda=["base", "mouse"]), found("no"), found("12"), found("any"),
             found("a b"), unreached("old: #1"), unreached("github.com", shell=False, reached=True),
             found("alias", hostname="gpu05", boot_id="gpu05"), found("otp", ssh_client="openssh")]
    entries = list(init.chosen(hosts))
    path = tmp_path / "cluster.yaml"
    init.write(path, init.text(entries, None, "~/launch"))
    assert set(read_cluster(path).nodes) == {"gpu05", "no", "12", "otp"}
    assert "there are base, mouse" in path.read_text()
    assert {entry.name for entry in entries if entry.left_out} == {"any", "a b", "old: #1", "github.com", "alias"}
    init.write(path, init.text([], None, "~/launch"))
    assert read_cluster(path).nodes == {} and "gpu05" in (tmp_path / "cluster.yaml.before").read_text()


def test_a_cluster_is_one_node_by_the_host_that_runs_no_jobs() -> None:
    mice, rats = slurm("c1", "c2"), slurm("r1", cluster="linux")
    hosts = [found("local"), found("c1", mice, hostname="c1.lab"), found("login", mice), found("login2", mice),
             found("r1", rats, submitit=False)]
    entries = {entry.found.name: entry for entry in init.chosen(hosts)}
    assert (entries["login"].name, entries["login"].via, entries["login"].left_out) == ("mice", "slurm", "")
    assert "--node mice:c1" in entries["c1"].left_out and "another login node" in entries["login2"].left_out
    assert (entries["r1"].name, entries["r1"].via) == ("r1", "slurm")  # nobody has named that cluster
    assert "needs submitit" in init.remarks(entries["r1"])[0]


def test_slurm_on_this_computer_is_submitted_to_here() -> None:
    mice = slurm("c1")
    entries = list(init.chosen([found("local", mice), found("login", mice)]))
    assert [(entry.name, entry.via, bool(entry.left_out)) for entry in entries] == [
        ("mice", "slurm", False), ("login", "ssh", True)]
    assert "login: here" in init.text(entries, None, "~/launch")


def test_the_table_says_what_is_to_be_done() -> None:
    done = init.Initialised(Path("x"), tuple(init.chosen([
        found("gpu05", kills_at_logout=True, gpus=[{"name": "H100", "memory_mb": 81920}] * 2, psutil=False),
        found("gpu06", kills_at_logout=True, lingers=True), unreached("old")])))
    rows = table(done).splitlines()
    assert "2 x H100 80 GB" in rows[1] and "812 GB" in rows[1] and "1,000,000" in rows[1] and " no " in rows[1]
    assert "not reached: it did not answer" in rows[3]
    [note] = notes(done)
    assert note.startswith("gpu05: KillUserProcesses=yes") and note.endswith("ssh gpu05 loginctl enable-linger")


def test_a_file_that_is_there_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    project, home = tmp_path / "project", tmp_path / "home"
    (project / "configs").mkdir(parents=True)
    monkeypatch.setenv("XDG_CONFIG_HOME", str(home))
    assert init.target(project, None, False) == home / "launch" / "cluster.yaml"
    (project / "configs" / "cluster.yaml").write_text("nodes: {}\n")
    with pytest.raises(Refused, match="already"):
        init.target(project, None, False)
    assert init.target(project, None, True) == project / "configs" / "cluster.yaml"


@pytest.mark.parametrize(("files", "bus", "kills"), [
    ({}, "", None),
    ({"etc/logind.conf": "#KillUserProcesses=yes\n[Login]\nKillUserProcesses = yes\n"}, "", True),
    ({"etc/logind.conf": "KillUserProcesses=no\n", "lib/logind.conf.d/b.conf": "KillUserProcesses=yes\n"}, "", True),
    ({"etc/logind.conf.d/b.conf": "KillUserProcesses=no\n", "lib/logind.conf.d/b.conf": "KillUserProcesses=yes\n"}, "",
     False),
    ({"etc/logind.conf": "KillUserProcesses=no\n"}, "b true", True),  # what runs counts
])
def test_whether_logind_ends_what_a_login_started(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bus: str,
                                                  files: dict[str, str], kills: bool | None) -> None:
    for name, text in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(text)
    monkeypatch.setattr(lingering, "_LOGIND_CONF", (str(tmp_path / "lib"), str(tmp_path / "etc")))
    monkeypatch.setattr(lingering, "said", lambda command: bus if command[0] == "busctl" else "")
    assert lingering.kills_at_logout() is kills


def test_a_supervisor_outlives_a_logout_that_ends_everything(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It is started below the user's own systemd; where that cannot be, as everywhere else."""
    tool = tmp_path / "systemd-run"
    tool.write_text('#!/bin/sh\necho "$XDG_RUNTIME_DIR $*" >"$0.said"\nwhile [ "$1" != -- ]; do shift; done; shift; '
                    '[ ! -e "$0.broken" ] || exit 1; exec "$@"\n')
    tool.chmod(0o755)
    runtime = tmp_path / "user" / str(os.getuid())
    runtime.mkdir(parents=True)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(lingering, "_RUNTIME", tmp_path / "user")
    monkeypatch.setattr(lingering, "kills_at_logout", lambda: True)
    ran = [lingering.run(["sh", "-c", "echo $0", "it runs"], os.environ, capture_output=True)]
    said = (tmp_path / "systemd-run.said").read_text()
    assert said == f"{runtime} --user --scope --quiet --collect -- sh -c echo $0 it runs\n"
    (tmp_path / "systemd-run.broken").touch()
    ran.append(lingering.run(["sh", "-c", "echo $0", "it runs"], os.environ, capture_output=True))
    assert [one.stdout for one in ran] == [b"it runs\n"] * 2
