"""`launch nodes`: whose GPUs these are, in a driver's words; what is not known is said to be unknown."""
from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from cluster.node import census
from launcher.census import NodeReport
from launcher.node_views import nodes_text

from .conftest import Person

GPU = {"index": 0, "uuid": "GPU-a", "name": "H100", "memory_mb": 81920, "used_mb": 0, "utilization": 0, "users": [],
       "leases": []}
USER = {"pid": 4242, "user": "kim", "since": None, "memory_mb": 72704, "program": "python", "command": ["python"],
        "job": None, "mine": False}
SMI = """#!/bin/sh
case $1 in
--query-gpu=uuid,utilization.gpu*) printf 'GPU-nodes-0, 98\\nGPU-nodes-1, [N/A]\\n' ;;
--query-gpu=*)
    printf '0, GPU-nodes-0, 81559, 71000, 550.54, NVIDIA H100\\n'
    printf '1, GPU-nodes-1, 81559, 3, 550.54, NVIDIA H100\\n' ;;
--query-compute-apps=*) printf 'GPU-nodes-0, %s, 70900, python\\n' ;;
esac
"""


def report(gpus: list[dict[str, Any]], **more: Any) -> NodeReport:
    said = {"gpus": gpus, "gpu_problem": "", "slurm_problem": "", "machines": [], "cpus": 64, "load": [3.2, 1, 1],
            "disk": {"free_bytes": 812e9, "total_bytes": 1e12, "free_inodes": 9, "path": "/"}, **more}
    return NodeReport("gpu05", "ssh", "gpu05", said)


def test_each_gpu_is_shown_with_whose_it_is() -> None:
    gpus = [GPU | {"used_mb": 72704, "utilization": 98, "users": [USER | {"job": "phase3-x"}]},
            *(GPU | {"index": index} for index in (1, 2)),
            GPU | {"index": 3, "used_mb": 900},
            GPU | {"index": 4, "leases": [{"job": "phase2-y", "user": "bob", "since": 0.0}]},
            GPU | {"index": 5, "users": None, "utilization": None}]
    lines = nodes_text([report(gpus), NodeReport("gpu06", "ssh", "gpu06", None, "no answer in 3 s")]).splitlines()
    assert lines[1].split("  ")[0] == "gpu05" and "2 of 6 free" in lines[1] and "812 GB" in lines[1]
    assert lines[2].startswith("gpu06") and lines[2].endswith("no answer in 3 s")
    who = {line.split()[1]: line for line in lines[5:]}
    assert "71 of 80 GB  98 %  kim pid 4242 python 71 GB (phase3-x)" in who["0"]
    assert who["1-2"].endswith("free") and "not shown" in who["3"] and "bob has it for phase2-y" in who["4"]
    assert who["5"].split()[-2:] == ["?", "?"]


def test_a_cluster_is_a_line_for_each_partition() -> None:
    machines = [{"name": f"gpu0{n}", "partition": "main", "default": True, "cpus": 16, "gpus": 8, "state": state}
                for n, state in enumerate(("idle", "mixed", "idle"))]
    text = nodes_text([report([], machines=machines)])
    assert "gpu05:main  24" in text and "3 machines: 2 idle, 1 mixed; the default" in text


def test_the_words_of_a_driver(person: Person, tmp_path: Path) -> None:
    smi = tmp_path / "bin" / "nvidia-smi"
    smi.parent.mkdir()
    with subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE) as training:
        smi.write_text(SMI % training.pid)
        smi.chmod(0o755)
        person.env["PATH"] = f"{smi.parent}:{os.environ['PATH']}"
        [local] = json.loads(person.run("nodes", "--json").stdout)
        first, second = local["census"]["gpus"]
        assert (first["utilization"], second["utilization"]) == (98, None)
        assert [(one["pid"], one["memory_mb"], one["mine"]) for one in first["users"]] == [(training.pid, 70900, True)]
        assert second["users"] == []
        shown = json.loads(person.run("ps", "--json").stdout)
        assert [(one["gpu"], one["pid"]) for one in shown if one["pid"] == training.pid] == [(0, training.pid)]
        assert f"launch adopt local:{training.pid} --name X" in person.run("ps").stderr
        training.kill()


def test_a_driver_that_hangs_is_not_waited_for(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    smi = tmp_path / "nvidia-smi"
    smi.write_text("#!/bin/sh\nexec sleep 60\n")
    smi.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(census, "GPUS_S", 0.3)
    said = census.census({"workdir": str(tmp_path)}, None)
    assert said["gpus"] == [] and "did not answer in 0.3 s" in said["gpu_problem"]
    assert " ? " in nodes_text([NodeReport("gpu05", "ssh", "gpu05", said)])
