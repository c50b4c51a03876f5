"""Environments, secrets and GPUs of a node, with fakes that are real executables."""
from __future__ import annotations

import os
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from cluster.errors import NodeFailure, Unusable
from cluster.node import environment, gpus
from cluster.spec import PythonEnv
from tests.node.conftest import Job

SMI = """#!/bin/sh
cat <<'END'
1, GPU-bbbb, 24564, 20000, 550.54, NVIDIA GeForce RTX 4090
0, GPU-aaaa, 24564, 3, 550.54, NVIDIA GeForce RTX 4090
2, GPU-cccc, [N/A], [N/A], 550.54, NVIDIA, an odd name
END
"""
CONDA = """
conda() {
    [ "$2" = mouse ] || { echo "EnvironmentNameNotFound: Could not find conda environment: $2" >&2; return 1; }
    echo "activating, and talking about it"
    export CONDA_PREFIX="@BASE@/envs/$2" PATH="@BASE@/envs/$2/bin:$PATH" SHLVL_LIKE="two
lines"
}
"""


def executable(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    path.chmod(0o755)
    return path


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[[str], None]:
    def install(text: str) -> None:
        executable(tmp_path / "bin" / "nvidia-smi", text)
        monkeypatch.setenv("PATH", f"{tmp_path / 'bin'}:{os.environ['PATH']}")

    return install


def test_gpus_are_read_and_chosen_by_use(smi: Callable[[str], None]) -> None:
    smi(SMI)
    found = gpus.list_gpus()
    assert [(gpu.index, gpu.uuid, gpu.used_mb) for gpu in found] == [
        (0, "GPU-aaaa", 3), (1, "GPU-bbbb", 20000), (2, "GPU-cccc", 0)]
    assert [gpu.index for gpu in gpus.choose(found, 2, None)] == [0, 2]
    assert [gpu.index for gpu in gpus.choose(found, 1, (1,))] == [1]
    assert gpus.used_mb(["GPU-aaaa", "GPU-bbbb"]) == 20003
    with pytest.raises(Unusable, match=r"asks for 2 GPUs, this node has 1 \(of the indices \[1\]"):
        gpus.choose(found, 2, (1,))


@pytest.mark.parametrize(("text", "words"), [
    ("#!/bin/sh\necho 'Unable to determine the device handle' >&2; exit 15\n", "device handle"),
    ("#!/bin/sh\necho what\n", "unexpected"),
    ("#!/bin/sh\nexec sleep 5\n", "did not answer"),
])
def test_a_sick_nvidia_smi_is_named(smi: Callable[[str], None], text: str, words: str) -> None:
    smi(text)
    with pytest.raises(NodeFailure, match=words):
        gpus.list_gpus(timeout_s=0.3)


def test_no_nvidia_smi_means_no_gpus(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpus.list_gpus() == []


@pytest.fixture
def conda(tmp_path: Path) -> Path:
    base = tmp_path / "mini conda'3"
    executable(base / "etc" / "profile.d" / "conda.sh", CONDA.replace("@BASE@", str(base)))
    executable(base / "envs" / "mouse" / "bin" / "python", f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    return base


def test_a_conda_shaped_environment_activates(conda: Path, make_job: Callable[..., Job]) -> None:
    python = PythonEnv("conda", "mouse", str(conda))
    env = environment.activate(python, {"PATH": os.environ["PATH"], "HOME": "/nowhere", "MINE": "a\nb"})
    assert env["CONDA_PREFIX"] == str(conda / "envs" / "mouse") and env["SHLVL_LIKE"] == "two\nlines"
    assert env["MINE"] == "a\nb"
    assert environment.python_of(python, env) == str(conda / "envs" / "mouse" / "bin" / "python")
    job = make_job("command", "sh", "-c", "command -v python; echo $CONDA_PREFIX", python=python).start()
    job.ended()
    assert job.log().splitlines() == [str(conda / "envs/mouse/bin/python"), str(conda / "envs/mouse")]


def test_what_cannot_be_activated_says_why(conda: Path, tmp_path: Path) -> None:
    with pytest.raises(Unusable, match="Could not find conda environment: rat"):
        environment.activate(PythonEnv("conda", "rat", str(conda)), os.environ)
    with pytest.raises(Unusable, match="no conda in .*miniconda3"):
        environment.activate(PythonEnv("conda", "mouse"), os.environ)
    with pytest.raises(Unusable, match="not there or not executable"):
        environment.activate(PythonEnv("venv", str(tmp_path)), os.environ)


def test_a_venv_comes_first_on_the_path(tmp_path: Path) -> None:
    executable(tmp_path / "bin" / "python", "#!/bin/sh\n")
    env = environment.activate(PythonEnv("venv", str(tmp_path)), {"PATH": "/bin", "PYTHONHOME": "/x"})
    assert env == {"PATH": f"{tmp_path}/bin:/bin", "VIRTUAL_ENV": str(tmp_path)}


def test_secrets_keep_their_bytes_and_their_file_is_private(tmp_path: Path, make_job: Callable[..., Job]) -> None:
    job = make_job("command", "sh", "-c", 'printf %s "$KEY"', secrets=("KEY",))
    workdir, value = job.run.path.parent.parent, "it's; $1 \"x\"\n한"
    environment.write_secrets(workdir, {"KEY": value, "OTHER": "1"})
    environment.write_secrets(workdir, {"OTHER": "2"})
    path = environment.secrets_file(workdir)
    assert path.stat().st_mode & 0o777 == 0o600
    assert environment.read_secrets(workdir, ("KEY", "OTHER", "NONE"))[0] == {"KEY": value, "OTHER": "2"}
    job.start().ended()
    assert job.log() == value
    written = [file for file in job.run.path.rglob("*") if file.is_file() and file.name != "rank-0.log"]
    assert not any("it's; $1" in file.read_text(errors="replace") for file in written)
    path.chmod(0o644)
    with pytest.raises(NodeFailure, match="can be read by others"):
        environment.read_secrets(workdir, ("KEY",))
