"""What a relative path means, and which code a stage runs."""
from __future__ import annotations

from pathlib import Path

import pytest

from cluster.inventory import Node
from configs.load import load_run, load_stage
from launcher import stages
from launcher.errors import Wrong
from launcher.nodes import load_nodes, node_named

_STAGE = "about: x\npython: {program}\ndefault_config: one\npaths: [data, out]\n"
GPU05 = Node("gpu05", data="/data/me")


@pytest.fixture
def project(tmp_path: Path) -> Path:
    (tmp_path / "configs" / "stages").mkdir(parents=True)
    (tmp_path / "configs" / "runs" / "x").mkdir(parents=True)
    (tmp_path / "configs" / "stages" / "x.yaml").write_text(_STAGE.format(program="x.py"))
    (tmp_path / "configs" / "runs" / "x" / "one.yaml").write_text("data: list.txt\nout: /abs/out\n")
    (tmp_path / "x.py").write_text("")
    return tmp_path


def paths(project: Path, node: Node, *sets: str) -> stages.Paths:
    stage = load_stage("x", project)
    return stages.paths_of(load_run(stage, None, list(sets), project), stage, node, project)


def test_a_run_file_speaks_of_the_nodes_data_directory(project: Path) -> None:
    assert paths(project, GPU05).values == {"data": "/data/me/list.txt", "out": "/abs/out"}
    with pytest.raises(Wrong, match="no `data:` directory"):
        paths(project, Node("gpu06"))


def test_a_set_speaks_of_the_current_directory_when_the_node_sees_it(project: Path) -> None:
    (project / "mine.txt").write_text("here")
    found = paths(project, GPU05, "data=mine.txt")
    assert found.values["data"] == str(project / "mine.txt") and found.asked() == [str(project / "mine.txt")]
    info = (project / "mine.txt").stat()
    same = {str(project / "mine.txt"): [info.st_ino, info.st_size, info.st_mtime_ns]}
    stages.check_paths(found, same, GPU05)
    for elsewhere in ({str(project / "mine.txt"): [info.st_ino, info.st_size + 1, info.st_mtime_ns]}, {}):
        with pytest.raises(Wrong) as error:
            stages.check_paths(found, elsewhere, GPU05)
        assert "--set data" in str(error.value) and "absolute path on gpu05" in str(error.value)


def test_a_path_that_is_not_made_yet_is_judged_by_what_is_above_it(project: Path) -> None:
    assert paths(project, GPU05, "out=new/deep").from_here == {"out": project}


def test_home_is_the_one_of_the_node(project: Path) -> None:
    stage = load_stage("x", project)
    run = load_run(stage, None, ["data=~/lists/a.txt"], project)
    values = stages.paths_of(run, stage, GPU05, project).values
    assert "data: /home/me/lists/a.txt" in stages.config_text(run, values, "/home/me")


def test_an_input_that_is_not_on_the_node_is_an_error_before_anything_starts(project: Path) -> None:
    missing = stages.Paths({"data": "/data/me/list.txt"}, {}, ("data",))
    with pytest.raises(Wrong, match="there is no /data/me/list.txt"):
        stages.check_paths(missing, {"/data/me/list.txt": None}, GPU05)


def test_the_code_is_the_tree_that_holds_the_program(
    project: Path, tmp_path_factory: pytest.TempPathFactory,
) -> None:
    stage = load_stage("x", project)
    assert stages.code_of(stage, project) == (project, None)
    (project / "deep").mkdir()
    assert stages.code_of(stage, project / "deep") == (project, None)
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    assert stages.code_of(load_stage("phase3", elsewhere), elsewhere)[0] == stages.installed_root()


def test_local_is_always_there_and_its_data_lies_beside_configs(project: Path) -> None:
    node = node_named("local", project / "configs")
    assert (node.via, node.data) == ("local", str(project / "data"))
    assert list(load_nodes(project)) == ["local"]


def test_a_cluster_file_names_nodes(project: Path) -> None:
    (project / "configs" / "cluster.yaml").write_text(
        "ssh_config: my_ssh\nnodes:\n"
        "  gpu05: {via: ssh, host: gpu5.lab, workdir: /w, gpus: [0, 1], env: {conda: mouse},\n"
        "    ssh: {client: openssh}}\n"
        "  lab: {via: slurm}\n  local: {via: local, workdir: /mine}\n")
    node = node_named("gpu05", project)
    assert (node.ssh_name, node.workdir, node.gpus, node.python.kind, node.python.value) == (
        "gpu5.lab", "/w", (0, 1), "conda", "mouse")
    assert node.ssh_client == "openssh"
    assert node.ssh_config == str(project / "configs" / "my_ssh")
    assert node_named("local", project).workdir == "/mine"
    assert list(load_nodes(project)) == ["local", "gpu05", "lab"]
    with pytest.raises(Wrong) as error:
        node_named("gpu5", project)
    assert "nearest: gpu05" in str(error.value)
