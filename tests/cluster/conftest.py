from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import pytest

from cluster.backends.base import Backend
from cluster.backends.host import HostBackend
from cluster.inventory import local_node


@pytest.fixture
def local(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Backend]:
    """This computer, with a workdir whose name holds what shells stumble over."""
    monkeypatch.setenv("LAUNCH_WORKDIR", str(tmp_path / "a'; echo $HOME; 작업"))
    backend = HostBackend(local_node())
    yield backend
    for view in backend.status(None)["jobs"]:
        if not view["by_hand"]:
            backend.kill(view["run_dir"], "the test", now=True)
