"""Options of sbatch in stage, run and cluster files."""
from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import ConfigError
from configs.load import load_cluster, load_run, load_stage

STAGE = """
about: a stage
command: [echo]
default_config: usual
resources: {sbatch: {account: mouse, mem: 4G}}
"""


@pytest.fixture
def project(tmp_path: Path) -> Path:
    for name, text in (("stages/say.yaml", STAGE), ("runs/say/usual.yaml", "resources: {sbatch: {mem: 8G}}\n")):
        path = tmp_path / "configs" / name
        path.parent.mkdir(parents=True)
        path.write_text(text)
    return tmp_path


def test_options_of_a_run_go_over_those_of_its_stage_and_keep_the_others(project: Path) -> None:
    stage = load_stage("say", project)
    assert load_run(stage, None, [], project).resources.sbatch == {"account": "mouse", "mem": "8G"}
    changed = load_run(stage, None, ["resources.sbatch={mem: 16G, exclusive: true}"], project).resources.sbatch
    assert changed == {"account": "mouse", "mem": "16G", "exclusive": True}


@pytest.mark.parametrize(("option", "says"), [
    ("time: 5", "use --time or `resources: {time: …}`"), ("ntasks_per_node: 2", "use `resources: {procs: …}`"),
    ("--job-name: x", "use --name"), ("array: 0-3", "use --sweep"), ("n: 2", "by their long names")])
def test_what_launch_itself_gives_to_sbatch_is_refused_with_its_own_word(project: Path, option: str, says: str) -> None:
    (project / "configs" / "cluster.yaml").write_text(f"nodes:\n  lab: {{via: slurm, sbatch: {{{option}}}}}\n")
    with pytest.raises(ConfigError) as error:
        load_cluster(project)
    assert says in str(error.value) and "cluster.yaml:2" in str(error.value)
