"""pytest plugin: the test bed, up once per session, and a watch over what each test leaves on it."""
from __future__ import annotations

import os
from collections import Counter
from collections.abc import Iterator
from typing import TypeVar

import pytest

from .bed import poll, unavailable
from .slurmbed import SlurmBed, not_installed
from .testbed import Testbed

AnyBed = TypeVar("AnyBed", bound=Testbed)
BEDS = ("testbed", "testbed_private_home", "slurm_bed", "slurm_bed_bare")


@pytest.fixture(scope="session")
def testbed() -> Iterator[Testbed]:
    """head and gpu01..gpu05 with one /home for all of them."""
    yield from _session(Testbed(f"shared-{os.getpid()}"))  # the name lets two sessions run on one machine


@pytest.fixture(scope="session")
def testbed_private_home() -> Iterator[Testbed]:
    """A second, independent bed whose nodes have a /home each."""
    yield from _session(Testbed(f"private-{os.getpid()}", "private"))


@pytest.fixture(scope="session")
def slurm_bed() -> Iterator[SlurmBed]:
    """The same machines as a SLURM cluster, with accounting; head is the login node."""
    yield from _session(SlurmBed(f"slurm-{os.getpid()}"))


@pytest.fixture(scope="session")
def slurm_bed_bare() -> Iterator[SlurmBed]:
    """A SLURM cluster without accounting: sacct has nothing to say."""
    yield from _session(SlurmBed(f"bare-{os.getpid()}", accounting=False))


def need(bed: AnyBed) -> AnyBed:
    """Skips where this machine cannot run it; a test of the `testbed` mark then fails in CI."""
    if why_not := unavailable() or (isinstance(bed, SlurmBed) and not_installed()):
        pytest.skip(why_not)
    return bed


def _session(bed: AnyBed) -> Iterator[AnyBed]:
    need(bed)
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
    """What is left, after sshd had a moment to end sessions; ends it, and switches nodes on again."""
    off = bed.powered_off()
    for node in off:
        bed.fault(node, "poweron")
    jobs = left_jobs(bed, patience_s) if isinstance(bed, SlurmBed) else []
    processes = [] if poll(lambda: not bed.processes(), patience_s) else bed.processes()
    if processes:
        bed.sweep()
    nodes = unusable_nodes(bed) if isinstance(bed, SlurmBed) else []
    mounts = list((Counter(bed.mounts()) - mounts_before).elements())
    return (
        [f"{node} is switched off" for node in off]
        + [f"job: {line}" for line in jobs]
        + [f"process: {line}" for line in processes]
        + [f"node: {line}" for line in nodes]
        + [f"mount: {line}" for line in mounts]
    )


def left_jobs(bed: SlurmBed, patience_s: float) -> list[str]:
    """The jobs in the queue, which is emptied; those that are just ending are given the time for it."""
    if poll(lambda: not bed.queue(), patience_s):
        return []
    left = [f"{job.id} {job.name} of {job.user}, {job.state} ({job.reason})" for job in bed.queue()]
    if left:
        bed.slurm("scancel", *sorted({job.id.split("_")[0] for job in bed.queue()}), user="root", check=False)
    return [] if all("COMPLETING" in line for line in left) else left


def unusable_nodes(bed: SlurmBed, patience_s: float = 30.0) -> list[str]:
    """The nodes that do not become idle by themselves, as a drained one never does; they are made to."""
    def settled() -> bool:
        states = set(bed.node_states().values())
        return states == {"idle"} or "drained" in states

    poll(settled, patience_s)
    left = [f"{node} is {state}" for node, state in bed.node_states().items() if state != "idle"]
    if left:
        bed.repair_nodes()
    return left


@pytest.hookimpl(tryfirst=True)
def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if set(BEDS) & set(getattr(item, "fixturenames", ())):
            item.add_marker(pytest.mark.testbed)
