"""Who uses the GPUs, by the words of nvidia-smi and of NVML, and what a driver that is sick comes to."""
from __future__ import annotations

import getpass
import os
import re
from pathlib import Path

import pytest

from cluster.errors import NodeFailure
from cluster.node import gpu_users
from cluster.node.gpu_users import GpuUser

NVML = """
class NVMLError(Exception): pass
class Process:
    def __init__(self, pid, used): self.pid, self.usedGpuMemory = pid, used
def nvmlInit(): {init}
def nvmlDeviceGetCount(): return 2
def nvmlDeviceGetHandleByIndex(number): return number
def nvmlDeviceGetUUID(number): return b"GPU-%d" % number
def nvmlDeviceGetGraphicsRunningProcesses(number):
    if number: raise NVMLError
    return [Process({pid}, 5 << 20)]
def nvmlDeviceGetComputeRunningProcesses(number):
    return [Process({pid}, 72704 << 20)] if number == 0 else [Process(999999999, None)]
"""


@pytest.fixture
def smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    path = tmp_path / "bin" / "nvidia-smi"
    path.parent.mkdir()
    monkeypatch.setenv("PATH", f"{path.parent}:{os.environ['PATH']}")
    return path


def says(smi: Path, script: str) -> None:
    smi.write_text(f"#!/bin/sh\n{script}\n")
    smi.chmod(0o755)


def test_a_process_is_told_with_user_memory_and_start(smi: Path) -> None:
    says(smi, f"echo 'GPU-a, {os.getpid()}, 72704, python'; echo 'GPU-b, 999999999, [N/A], [Not Found]'; "
              f"echo 'GPU-a, {os.getpid()}, 72704, python'")
    mine, gone = gpu_users.gpu_users()
    assert (mine.uuid, mine.user, mine.memory_mb) == ("GPU-a", getpass.getuser(), 72704)
    assert re.fullmatch(rf"{getpass.getuser()} pid {os.getpid()} \S+ 71 GB since (\d\d \w+ )?\d\d:\d\d", mine.told())
    assert gone == GpuUser("GPU-b", 999999999, "?", None, None, None, ()) and gone.told() == "? pid 999999999 ?"


@pytest.mark.parametrize(("script", "words"), [
    ("exec sleep 9", "did not say in 0.3 s"), ("echo 'driver mismatch' >&2; exit 9", "driver mismatch"),
    ("echo 'GPU-a, what'", "unexpected")])
def test_a_sick_driver_is_named(smi: Path, script: str, words: str) -> None:
    says(smi, script)
    with pytest.raises(NodeFailure, match=words):
        gpu_users.gpu_users(timeout_s=0.3)


def test_nobody_where_there_is_no_driver(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    assert gpu_users.gpu_users() == []


def test_nvml_is_asked_where_it_is_and_nvidia_smi_where_it_cannot(smi: Path, tmp_path: Path,
                                                                  monkeypatch: pytest.MonkeyPatch) -> None:
    says(smi, f"echo 'GPU-9, {os.getpid()}, 7, python'")
    monkeypatch.setattr(gpu_users, "has_nvml", lambda: True)
    monkeypatch.setenv("PYTHONPATH", str(tmp_path))
    (tmp_path / "pynvml.py").write_text(NVML.format(pid=os.getpid(), init="pass"))
    found = {(one.uuid, one.pid, one.memory_mb) for one in gpu_users.gpu_users()}
    assert found == {("GPU-0", os.getpid(), 72704), ("GPU-1", 999999999, None)}
    (tmp_path / "pynvml.py").write_text(NVML.format(pid=os.getpid(), init="raise NVMLError"))
    assert [(one.uuid, one.memory_mb) for one in gpu_users.gpu_users()] == [("GPU-9", 7)]


@pytest.mark.parametrize(("command", "program"), [
    (("/usr/bin/python3.11", "train.py"), "python"), (("/opt/app/pytrainer",), "pytrainer"), ((), "?")])
def test_a_program_is_told_by_its_name(command: tuple[str, ...], program: str) -> None:
    assert GpuUser("GPU-a", 1, "kim", None, None, None, command).program == program
