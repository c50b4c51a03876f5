"""A world of its own for each test, and a watch over what a test leaves behind."""
from __future__ import annotations

import os

os.environ["OMP_NUM_THREADS"] = "1"  # read once, when torch is loaded; more only slows small tests

import contextlib  # noqa: E402
import signal  # noqa: E402
import threading  # noqa: E402
import time  # noqa: E402
from collections.abc import Generator, Iterator  # noqa: E402
from pathlib import Path  # noqa: E402

import psutil  # noqa: E402
import pytest  # noqa: E402

pytest_plugins = ["tests.testbed.fixtures", "tests.slurm.fixtures"]

# Started in the background the tests would ignore Ctrl-C, and every `launch` they start with them.
signal.signal(signal.SIGINT, signal.default_int_handler)

_SETTLE_S = 3.0  # threads and children may take this long to end after their test
_KEPT = {"LAUNCH_SHARED", "LAUNCH_REQUIRE_TESTBED"}  # settings of the tests themselves
_ENV_NOISE = {"PYTEST_CURRENT_TEST", "PYTEST_VERSION"}
_ENV_OF_LIBRARIES = ("KMP_", "TORCH", "CUDA_", "TRITON_", "WANDB_", "TOKENIZERS_")  # set by their import
_LASTING = ("multiprocessing.resource_tracker", "multiprocessing.forkserver")  # one per Python, ends with it
_TRUE_HOME = Path.home()


@pytest.fixture(scope="session")
def shared(pytestconfig: pytest.Config) -> Path:
    """The folder of reference data and fixtures: $LAUNCH_SHARED, else `shared` beside the checkout."""
    path = Path(os.environ.get("LAUNCH_SHARED") or pytestconfig.rootpath.parent / "shared")
    if not path.is_dir():
        pytest.skip(f"needs the reference data in {path} (or where $LAUNCH_SHARED says)")
    return path


@pytest.fixture(autouse=True)
def nothing_leaks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """Fails a test that leaves environment variables, threads or processes; and takes them away."""
    base = str(tmp_path_factory.getbasetemp())
    env, threads, processes = dict(os.environ), set(threading.enumerate()), set(_processes(base))
    yield
    left = [*_changed(env), *_left_threads(threads), *_left_processes(base, processes)]
    if left:
        pytest.fail("the test left behind:\n  " + "\n  ".join(left), pytrace=False)


@pytest.fixture(autouse=True)
def own_world(
    nothing_leaks: None, monkeypatch: pytest.MonkeyPatch, tmp_path_factory: pytest.TempPathFactory,
) -> Path:
    """An empty home, no LAUNCH_* of the person, and git and pip that work without that person's files."""
    home = tmp_path_factory.mktemp("home")
    for name in set(os.environ) - _KEPT:
        if name.startswith(("LAUNCH_", "XDG_", "WANDB_")):
            monkeypatch.delenv(name)
    for name, value in {
        "HOME": str(home), "LAUNCH_HOME": str(home / "launch-state"), "LAUNCH_WORKDIR": str(home / "launch"),
        "XDG_STATE_HOME": str(home / "state"), "XDG_CACHE_HOME": str(home / "cache"),
        "XDG_CONFIG_HOME": str(home / ".config"),
        "GIT_AUTHOR_NAME": "A Person", "GIT_AUTHOR_EMAIL": "person@example.org",
        "GIT_COMMITTER_NAME": "A Person", "GIT_COMMITTER_EMAIL": "person@example.org",
        **_tools_of_the_true_home(),
    }.items():
        monkeypatch.setenv(name, value)
    return home


@pytest.hookimpl(wrapper=True)
def pytest_runtest_makereport(item: pytest.Item) -> Generator[None, pytest.TestReport, pytest.TestReport]:
    """In CI (LAUNCH_REQUIRE_TESTBED=1) a test that needs the test bed and is skipped has failed."""
    report = yield
    required = os.environ.get("LAUNCH_REQUIRE_TESTBED") == "1" and item.get_closest_marker("testbed")
    if report.skipped and required:
        reason = report.longrepr[2] if isinstance(report.longrepr, tuple) else report.longrepr
        report.outcome, report.longrepr = "failed", f"skipped, and the test bed is required here: {reason}"
    return report


def _tools_of_the_true_home() -> dict[str, str]:
    """pip's settings (which index to ask) and pyenv's Pythons, where a person keeps them in the home."""
    found = {"PYENV_ROOT": _TRUE_HOME / ".pyenv", "PIP_CONFIG_FILE": _TRUE_HOME / ".config/pip/pip.conf"}
    return {name: str(path) for name, path in found.items() if name not in os.environ and path.exists()}


def _changed(before: dict[str, str]) -> list[str]:
    now = dict(os.environ)
    names = [name for name in {**before, **now} if before.get(name) != now.get(name)
             and name not in _ENV_NOISE and not name.startswith(_ENV_OF_LIBRARIES)]
    for name in names:
        os.environ.pop(name, None)
        if name in before:
            os.environ[name] = before[name]
    return [f"environment variable {name}={now.get(name)!r} (was {before.get(name)!r})" for name in names]


def _left_threads(before: set[threading.Thread]) -> list[str]:
    deadline = time.monotonic() + _SETTLE_S
    while left := [one for one in set(threading.enumerate()) - before if not one.name.startswith("pytest")]:
        if time.monotonic() > deadline:
            return [f"thread {one.name}" for one in left]
        left[0].join(0.05)
    return []


def _left_processes(base: str, before: set[psutil.Process]) -> list[str]:
    deadline = time.monotonic() + _SETTLE_S
    while left := [one for one in _processes(base) if one not in before]:
        if time.monotonic() > deadline:
            said = [f"process {one.pid}: {_command(one)}" for one in left]
            for one in left:
                with contextlib.suppress(psutil.NoSuchProcess):
                    one.kill()
            psutil.wait_procs(left, timeout=_SETTLE_S)
            return said
        time.sleep(0.05)
    return []


def _processes(base: str) -> list[psutil.Process]:
    """Children of the tests, and detached processes that name the tests' temporary directory."""
    own = psutil.Process()
    found = {*own.children(recursive=True)}
    found |= {one for one in psutil.process_iter() if one.pid != own.pid and base in _command(one)}
    return [one for one in found if not any(word in _command(one) for word in _LASTING)]


def _command(process: psutil.Process) -> str:
    try:
        return " ".join(process.cmdline()) or process.name()
    except psutil.Error:
        return ""
