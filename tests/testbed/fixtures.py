"""pytest plugin: the test bed, up once per session, and a watch over what each test leaves on it."""
from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator

import pytest

from .bed import poll, unavailable
from .testbed import Testbed

BEDS = ("testbed", "testbed_private_home")


@pytest.fixture(scope="session")
def testbed() -> Iterator[Testbed]:
    """head and gpu01..gpu05 with one /home for all of them."""
    yield from _session("shared")


@pytest.fixture(scope="session")
def testbed_private_home() -> Iterator[Testbed]:
    """A second, independent bed whose nodes have a /home each."""
    yield from _session("private")


def _session(home: str) -> Iterator[Testbed]:
    if why_not := unavailable():
        pytest.skip(why_not)
    bed = Testbed(f"{home}-{os.getpid()}", home)  # the name lets two sessions run on one machine
    try:
        bed.up()
        yield bed
    finally:
        bed.down()


@pytest.fixture(autouse=True)
def nothing_left_on_the_nodes(request: pytest.FixtureRequest) -> Iterator[None]:
    """Fails a test that leaves a user's process, a mount or a switched-off node; and cleans up after it."""
    beds: list[Testbed] = [request.getfixturevalue(name) for name in BEDS if name in request.fixturenames]
    before = [Counter(bed.mounts()) for bed in beds]
    yield
    left = [line for bed, mounts in zip(beds, before) for line in leftovers(bed, mounts)]
    if left:
        pytest.fail("left on the nodes of the test bed:\n  " + "\n  ".join(left), pytrace=False)


def leftovers(bed: Testbed, mounts_before: Counter[str], patience_s: float = 5.0) -> list[str]:
    """What is left, after sshd had a moment to end sessions; kills processes, switches nodes on again."""
    off = bed.powered_off()
    for node in off:
        bed.fault(node, "poweron")
    processes = [] if poll(lambda: not bed.processes(), patience_s) else bed.processes()
    if processes:
        bed.sweep()
    mounts = list((Counter(bed.mounts()) - mounts_before).elements())
    return (
        [f"{node} is switched off" for node in off]
        + [f"process: {line}" for line in processes]
        + [f"mount: {line}" for line in mounts]
    )


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if set(BEDS) & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.testbed)
