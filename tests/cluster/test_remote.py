"""The agent is carried to a node that has nothing, through login shells that are not alike."""
from __future__ import annotations

import io
import os
import shutil
import subprocess
import sys
import zipfile
from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster import carry, wire
from cluster.backends.host import HostBackend
from cluster.errors import NodeFailure, Refused, Unreachable, Unusable
from cluster.inventory import Node
from cluster.remote import _Conversation
from cluster.spec import CodeRef, PythonEnv
from tests.cluster.jobs import archive, command
from tests.cluster.pipe import PipeShell
from tests.helpers import wait_until

SHELLS = [shell for shell in ("sh", "bash", "dash", "tcsh", "fish", "zsh") if shutil.which(shell)]
TALKING_SHELL = """#!/bin/sh
echo "Welcome! ==not the mark== {"
echo "quota: disk almost full" >&2
exec sh "$@"
"""


@pytest.fixture
def node(tmp_path: Path) -> Node:
    return Node("box", workdir=str(tmp_path / "work dir'; echo"), python=PythonEnv("python", sys.executable))


@pytest.fixture
def home(tmp_path: Path) -> str:
    (tmp_path / "their home").mkdir()
    return str(tmp_path / "their home")


@pytest.fixture
def ends_jobs() -> Iterator[list[HostBackend]]:
    backends: list[HostBackend] = []
    yield backends
    for backend in backends:
        for view in backend.status(None)["jobs"]:
            backend.kill(view["run_dir"], "the test", now=True)


def test_the_zip_is_the_same_every_time_and_holds_no_third_party() -> None:
    carry.pack.cache_clear()
    first = carry.pack()
    carry.pack.cache_clear()
    assert carry.pack() == first
    names = zipfile.ZipFile(io.BytesIO(first.content)).namelist()
    assert names == sorted(names)
    assert {"__main__.py", "cluster/contract.py", "cluster/node/supervisor.py"} <= set(names)
    assert not any("shell" in name for name in names)
    assert [name for name in names if "backends" in name] == ["cluster/backends/__init__.py", "cluster/backends/slurm.py"]


@pytest.mark.parametrize("shell", SHELLS)
def test_one_line_means_the_same_to_every_login_shell(shell: str, node: Node, home: str) -> None:
    remote = PipeShell(node, home, shutil.which(shell) or shell)
    answer = remote.ask({"op": "prepare", "workdir": node.workdir, "stat": ["/no; such '$HOME"]})
    assert answer["workdir"] == node.workdir
    assert answer["python"] == sys.executable
    assert answer["stats"] == {"/no; such '$HOME": None}
    assert remote.commands == 4  # find Python, the agent is missing, carry it, ask
    assert PipeShell(node, home).ask({"op": "status", "workdir": node.workdir})["jobs"] == []


def test_later_commands_cost_one_exec(node: Node, home: str) -> None:
    PipeShell(node, home).ask({"op": "status", "workdir": node.workdir})
    later = PipeShell(node, home)
    later.ask({"op": "status", "workdir": node.workdir})
    assert later.commands == 1


def test_a_talking_login_shell_changes_nothing(node: Node, home: str, tmp_path: Path) -> None:
    talking = tmp_path / "talking"
    talking.write_text(TALKING_SHELL)
    talking.chmod(0o755)
    assert PipeShell(node, home, str(talking)).ask({"op": "prepare", "workdir": node.workdir})["hostname"]


def test_workdir_in_the_home_and_a_python_found_on_the_path(home: str, ends_jobs: list[HostBackend]) -> None:
    """The node's own Python, which has nothing of ours, runs agent, supervisor and rank."""
    node = Node("box", workdir="~/jobs")
    backend = HostBackend(node, PipeShell(node, home))
    ends_jobs.append(backend)
    answer = backend.prepare()
    assert answer["workdir"] == f"{home}/jobs"
    assert Path(answer["python"]).parent in (Path("/usr/bin"), Path("/usr/local/bin"))
    run = backend.submit(command("sh", "-c", "echo 'a b;' \"$LAUNCH_JOB_ID\"", node="box"), None, {})
    frames = list(backend.logs(run["run_dir"], follow=True))
    assert b"".join(body for _, body in frames) == f"a b; {run['id']}\n".encode()
    assert frames[-1][0]["end"]["state"] == "COMPLETED"


def test_a_python_that_went_away_is_looked_for_again(node: Node, home: str, tmp_path: Path) -> None:
    link = tmp_path / "python-of-the-node"
    link.symlink_to(sys.executable)
    node = Node("box", workdir=node.workdir, python=PythonEnv("python", str(link)))
    PipeShell(node, home).ask({"op": "status", "workdir": node.workdir})
    link.unlink()
    assert PipeShell(node, home).ask({"op": "prepare", "workdir": node.workdir})["python"] != str(link)


def test_no_python_is_one_clear_message(node: Node, home: str, tmp_path: Path) -> None:
    tools = tmp_path / "bin"
    tools.mkdir()
    for tool in ("sh", "dd"):
        (tools / tool).symlink_to(shutil.which(tool) or tool)
    bare = PipeShell(Node("box", workdir=node.workdir), home, path=str(tools))
    with pytest.raises(Unusable, match="no Python >= 3.10") as caught:
        bare.ask({"op": "prepare", "workdir": node.workdir})
    assert "agent_python" in str(caught.value) and caught.value.exit_code == 2
    with pytest.raises(Unusable, match="agent_python /no/python"):
        PipeShell(Node("box", agent_python="/no/python"), home).ask({"op": "prepare", "workdir": "~/launch"})
    assert not Path(node.workdir).exists()


def test_a_workdir_below_a_file_is_refused_with_a_remedy(home: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    node = Node("box", workdir=str(tmp_path / "file" / "work"))
    with pytest.raises(Refused, match="Not a directory") as caught:
        PipeShell(node, home).ask({"op": "prepare", "workdir": node.workdir})
    assert "workdir:" in str(caught.value) and "Traceback" not in str(caught.value)


def test_an_agent_that_fails_says_so_without_a_traceback(node: Node, home: str) -> None:
    remote = PipeShell(node, home)
    with pytest.raises(NodeFailure, match=r"KeyError: 'run_dir' \(details.py:\d+\)"):
        remote.ask({"op": "show"})
    with pytest.raises(Unusable, match="no question 'dance'"):
        remote.ask({"op": "dance"})


def test_a_login_that_is_not_allowed_shows_its_words(node: Node, home: str, tmp_path: Path) -> None:
    nologin = tmp_path / "nologin"
    nologin.write_text("#!/bin/sh\necho 'This account is currently not available.' >&2\nexit 1\n")
    nologin.chmod(0o755)
    with pytest.raises(NodeFailure, match="exit code 1.*\n.*not available"):
        PipeShell(node, home, str(nologin)).ask({"op": "status", "workdir": node.workdir})


def test_a_silent_node_is_given_up_at_the_deadline(node: Node, home: str, tmp_path: Path) -> None:
    hanging = tmp_path / "hanging"
    hanging.write_text("#!/bin/sh\nexec tr -d '\\000-\\377'\n")
    hanging.chmod(0o755)
    with pytest.raises(Unreachable, match="no answer"):
        PipeShell(node, home, str(hanging)).ask({"op": "status", "workdir": node.workdir}, timeout_s=0.5)


def test_code_is_sent_once_and_a_submit_that_brings_it_again_is_answered(
        node: Node, home: str, ends_jobs: list[HostBackend]) -> None:
    backend = HostBackend(node, PipeShell(node, home))
    ends_jobs.append(backend)
    code = archive(("data", os.urandom(3_000_000), ""), ("say.sh", b"#!/bin/sh\nwc -c < data\n", ""))
    spec = command("./say.sh", node="box", code=CodeRef("abc"))
    run = backend.submit(spec, None, {}, code)
    assert b"".join(body for _, body in backend.logs(run["run_dir"], follow=True)).strip() == b"3000000"
    assert backend.submit(spec, None, {}, io.BytesIO(code)) == run
    assert backend.prepare(code_digest="abc")["have_code"]
    with pytest.raises(NodeFailure, match="whole"):
        backend.submit(command("true", code=CodeRef("cut")), None, {}, code[:100_000])


def test_a_log_stream_ends_with_its_client(node: Node, home: str, ends_jobs: list[HostBackend]) -> None:
    shell = PipeShell(node, home)
    backend = HostBackend(node, shell)
    ends_jobs.append(backend)
    run = backend.submit(command("sh", "-c", "echo here; sleep 60", node="box"), None, {})
    frames = backend.logs(run["run_dir"], follow=True)
    assert next(frames)[1] == b"here\n"
    agent = shell.running
    assert agent and agent.poll() is None
    frames.close()  # closes its pipes and waits for the agent
    assert wait_until(lambda: agent.poll() is not None)


def test_python_places_follow_the_environment() -> None:
    assert wire.python_places(Node("n", agent_python="/x/python")) == ["/x/python"]
    conda = wire.python_places(Node("n", python=PythonEnv("conda", "lab", "/opt/c")))
    assert conda[0] == "/opt/c/envs/lab/bin/python" and conda[-1] == "/opt/c/bin/python"
    assert wire.python_places(Node("n", python=PythonEnv("venv", "~/v")))[0] == "~/v/bin/python"


def test_the_line_holds_nothing_that_login_shells_read_differently() -> None:
    inner = wire.LINE.removeprefix("exec sh -c '").removesuffix("'")
    assert not set("'\\!\n") & set(inner)
    stdin = wire.framed("cat; echo end") + b"rest\n"
    said = subprocess.run(["sh", "-c", wire.LINE], input=stdin, capture_output=True)
    assert said.stdout == b"rest\nend\n"


class _Torn:
    """A pipe whose agent has ended well, and of whose words only these have come."""

    def __init__(self, content: bytes) -> None:
        self.content = content

    def send(self, content: bytes) -> None:
        pass

    def receive(self, limit: int, timeout_s: float) -> bytes:
        content, self.content = self.content, b""
        return content

    def errors(self) -> bytes:
        return b""

    def exit_code(self) -> int | None:
        return 0


@pytest.mark.parametrize("frames", [b"", b'{"n": 10', b'{"n": 10}\n12345'])
def test_an_answer_that_stops_in_its_middle_is_a_broken_link(node: Node, frames: bytes) -> None:
    conversation = _Conversation(_Torn(b"=m=\n" + frames), node, b"=m=", None)
    assert conversation.begin() == 0
    with pytest.raises(Unreachable, match="the connection broke"):
        list(conversation.frames())
    with pytest.raises(NodeFailure, match="no answer"):
        _Conversation(_Torn(b"Welcome"), node, b"=m=", None).begin()
