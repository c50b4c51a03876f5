"""What a person types arrives unchanged, whatever shell answers on the node."""
from __future__ import annotations

import json
import shutil
from collections.abc import Iterator
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import yaml

from tests.testbed.testbed import Testbed

from .lab import Lab

HARD = ["a b", "it's", 'say "hi"', "a;b|c&d", "$HOME `id` $(id)", "line\nline\n", "쥐 실험", "*?[x]{a,b}", "!bang",
        "\\n", "-x", "", "%s", "#no"]
ECHO = "import json, os, sys; print(json.dumps([sys.argv[1:], os.environ['HARD'], os.getcwd(), sys.stdin.read()]))"


@pytest.fixture(params=["bash", "tcsh and a talking .bashrc"])
def shell(request: pytest.FixtureRequest, lab: Lab, testbed: Testbed) -> Iterator[Lab]:
    with ExitStack() as changes:
        if request.param != "bash":
            changes.enter_context(testbed.talking_bashrc(lab.node, "alice"))
            changes.enter_context(testbed.login_shell(lab.node, "alice"))
        yield lab


def test_arguments_directories_environment_and_job_names(shell: Lab, tmp_path: Path) -> None:
    where = tmp_path / "쥐 it's; $HOME"
    where.mkdir()
    (where / "a 'quoted' file.txt").write_text("x")
    assert shell.cluster
    cluster = yaml.safe_load(shell.cluster.read_text())
    value = "it's; $HOME\nnew line 쥐"
    cluster["nodes"]["gpu05"] |= {"env_vars": {"HARD": value}, "workdir": "/home/alice/launch/w 쥐's; $X"}
    shell.cluster.write_text(yaml.safe_dump(cluster, allow_unicode=True))
    person = replace(shell, project=where)
    name = "쥐 it's \"$HOME\"; x"
    job = person.submit("--name", name, "--", "python", "-c", ECHO, *HARD)
    person.launch("wait", name)
    argv, hard, cwd, stdin = json.loads(person.logs(name))
    assert argv == HARD
    assert hard == value
    assert cwd == f"/home/alice/launch/w 쥐's; $X/runs/{job}/code"
    assert stdin == ""
    assert person.status(job)["name"] == name
    assert (where / "a 'quoted' file.txt").name in person.submit_and_read("--", "ls")


def test_a_conda_environment_is_activated(lab: Lab, testbed: Testbed) -> None:
    assert lab.cluster
    with testbed.conda(lab.node, "alice", "mouse facelift"):
        cluster = yaml.safe_load(lab.cluster.read_text())
        cluster["nodes"]["gpu05"]["env"] = {"conda": "mouse facelift"}
        lab.cluster.write_text(yaml.safe_dump(cluster))
        said = lab.submit_and_read("--", "sh", "-c", 'echo "$CONDA_PREFIX $TEST_CONDA_ACTIVATED $(command -v python)"')
        prefix = "/home/alice/miniconda3/envs/mouse facelift"
        assert said == f"{prefix} 1 {prefix}/bin/python\n"
        cluster["nodes"]["gpu05"]["env"] = {"conda": "nothing"}
        lab.cluster.write_text(yaml.safe_dump(cluster))
        refused = lab.launch("submit", "--node", lab.node, "--follow", "--", "true", code=None)
        assert refused.returncode in (1, 2) and "nothing" in refused.stderr, refused.stderr


def test_cwd_runs_in_place_and_copies_nothing(lab: Lab, testbed: Testbed) -> None:
    make = 'mkdir -p "/home/alice/Face Lift" && cd "/home/alice/Face Lift" && git init -q && echo x > new.txt'
    testbed.sh(lab.node, make, user="alice")
    try:
        job = lab.submit("--cwd", "/home/alice/Face Lift", "--name", "x", "--", "sh", "-c", "pwd; ls")
        lab.launch("wait", "x")
        assert lab.logs("x") == "/home/alice/Face Lift\nnew.txt\n"
        assert "new.txt" in lab.launch("show", job).stdout
    finally:
        shutil.rmtree(testbed.root / "home/alice/Face Lift")


def test_a_command_is_restarted_with_other_words(tmp_path: Path) -> None:
    """They stand in the job from then on; a word of its config is refused, with the command that is meant."""
    lab = Lab(tmp_path, tmp_path)
    lab.submit("--cwd", str(tmp_path), "--name", "x", "--", "echo", "--lr", "1")
    lab.launch("wait", "x")
    refused = lab.launch("restart", "x", "--set", "lr=2", code=2)
    assert "launch restart" in refused.stderr and "-- echo --lr 1" in refused.stderr, refused.stderr
    said = lab.launch("restart", "x", "--", "echo", "a b", "--lr", "2")
    assert "echo --lr 1 -> echo 'a b' --lr 2" in said.stderr, said.stderr
    lab.launch("wait", "x")
    assert lab.logs("x") == "a b --lr 2\n"
    lab.launch("restart", "x")
    lab.launch("wait", "x")
    assert lab.logs("x") == "a b --lr 2\n" and "'a b' --lr 2" in lab.launch("show", "x").stdout
