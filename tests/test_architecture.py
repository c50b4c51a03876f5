"""Who may import whom, read from the source of every file; and what the common commands load."""
from __future__ import annotations

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
MAY_IMPORT = {  # package -> what of ours it may import
    "models": {"models"},
    "jobs": {"jobs", "models", "configs", "cluster.contract"},
    "configs": {"configs"},
    "launcher": {"launcher", "configs", "cluster"},
    "cluster": {"cluster"},
}
ONLY_IN = {  # third-party name -> the files that may know it
    "fabric": {"cluster/shell.py"},
    "paramiko": {"cluster/shell.py"},
    "invoke": {"cluster/shell.py"},
    "submitit": {"cluster/backends/slurm.py"},
    "gsplat": {"models/gaussians.py"},
    "wandb": {"jobs/metrics.py"},
    "yaml": {"configs/yaml12.py"},
}
NEVER = {"torchvision", "torchaudio", "timm", "open_clip", "lpips", "torch_fidelity"}
CARRIED = ("cluster/__init__.py", "cluster/contract.py", "cluster/spec.py", "cluster/states.py",
           "cluster/events.py", "cluster/journal.py", "cluster/errors.py", "cluster/node/",
           "cluster/backends/slurm.py")
CARRIED_OF_OURS = ("cluster.contract", "cluster.spec", "cluster.states", "cluster.events", "cluster.journal",
                   "cluster.errors", "cluster.node", "cluster.backends.slurm")
HEAVY = {"yaml", "msgspec", "fabric", "paramiko", "psutil", "submitit", "torch", "numpy"}


def sources(package: str) -> list[str]:
    return sorted(str(path.relative_to(ROOT)) for path in (ROOT / package).rglob("*.py"))


ALL = [name for package in MAY_IMPORT for name in sources(package)]


def imports(name: str) -> Iterator[tuple[int, str]]:
    """(line, full module) of each import in a file, also inside functions; relative ones made absolute."""
    package = name.removesuffix(".py").split("/")[:-1]
    for node in ast.walk(ast.parse((ROOT / name).read_text(), name)):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            above = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*above, *([node.module] if node.module else [])])
            # `from cluster import contract` may name a module: the longer name is the one to judge
            yield from ((node.lineno, f"{module}.{alias.name}") for alias in node.names)


def within(module: str, parents: set[str] | tuple[str, ...]) -> bool:
    return any(module == parent or module.startswith(f"{parent}.") for parent in parents)


@pytest.mark.parametrize("name", ALL)
def test_arrows_point_one_way(name: str) -> None:
    package = name.split("/")[0]
    wrong = [f"{name}:{line}: imports {module}" for line, module in imports(name)
             if within(module, set(MAY_IMPORT) | {"tests"}) and not within(module, MAY_IMPORT[package])]
    assert not wrong


@pytest.mark.parametrize("name", ALL)
def test_a_third_party_name_lives_in_one_file(name: str) -> None:
    wrong = [f"{name}:{line}: {module}" for line, module in imports(name)
             if name not in ONLY_IN.get(module.split(".")[0], {name}) or module.split(".")[0] in NEVER]
    assert not wrong


@pytest.mark.parametrize("name", [name for name in ALL if name.startswith(CARRIED)])
def test_what_is_carried_to_a_node_needs_only_the_standard_library(name: str) -> None:
    wrong = [f"{name}:{line}: {module}" for line, module in imports(name)
             if module.split(".")[0] not in sys.stdlib_module_names and not within(module, CARRIED_OF_OURS)
             and name not in ONLY_IN.get(module.split(".")[0], ())]  # submitit is looked for where it is needed
    assert not wrong


@pytest.mark.parametrize("name", sources("configs"))
def test_configs_are_read_without_torch(name: str) -> None:
    allowed = {*sys.stdlib_module_names, "yaml", "msgspec", "configs"}
    assert [module for _, module in imports(name) if module.split(".")[0] not in allowed] == []


def test_the_launcher_package_is_empty() -> None:
    """One re-export there makes every job that imports a part of it load the whole command line."""
    assert ast.parse((ROOT / "launcher/__init__.py").read_text()).body == []


@pytest.mark.parametrize("command", [["--help"], ["status"], ["logs", "--help"]])
def test_the_common_commands_load_only_the_standard_library(command: list[str], own_world: Path) -> None:
    code = ("import sys; from launcher.cli import main\ntry: main()\nexcept SystemExit: pass\n"
            "print(*sys.modules, file=sys.stderr)")
    done = subprocess.run([sys.executable, "-c", code, *command], capture_output=True, text=True,
                          cwd=own_world, timeout=60)
    loaded = {name.split(".")[0] for name in done.stderr.strip().splitlines()[-1].split()}
    assert "launcher" in loaded, done.stderr
    assert loaded & HEAVY == set()


@pytest.mark.parametrize("stage", ["phase1", "phase3", "face-voice", "clap1", "clap2", "clap3", "clap-evaluate", "clap-generate"])
def test_no_key_of_a_run_file_is_dead(stage: str) -> None:
    """Each key of a run file is read somewhere in jobs/ or models/."""
    from configs.keys import known_keys
    from configs.schema import SCHEMAS

    nodes = [node for package in ("jobs", "models") for name in sources(package)
             for node in ast.walk(ast.parse((ROOT / name).read_text(), name))]
    read = {node.attr for node in nodes if isinstance(node, ast.Attribute)}
    read |= {node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)}
    words = {key.rpartition(".")[2] for key in known_keys(SCHEMAS[stage]) if not key.startswith("resources")}
    assert sorted(words - read) == []


def test_ruff_has_nothing_to_say() -> None:
    done = subprocess.run([sys.executable, "-m", "ruff", "check", "--no-cache", "--output-format", "concise", str(ROOT)],
                          capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
