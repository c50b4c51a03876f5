"""How long a job will take and how much disk, by what was measured on its node; and how that is said."""
from __future__ import annotations

import json
import os
import time
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from cluster.node.measured import Expected, Measure, expected
from cluster.spec import Cost, digest
from launcher.views import age, lasting

if TYPE_CHECKING:
    from configs.costs import Volume
    from configs.load import Resolved
    from launcher.stages import Paths, Plan, Request

_LIST = "data_train.txt"  # of a folder that stands for its list
NOT_MEASURED = "not measured yet; --dry-run --calibrate measures it with a few steps on the node"


@dataclass(frozen=True)
class Known:
    """What the node knows about jobs like this one. `measure` None: it has had none."""

    measure: Measure | None
    free_bytes: float


def volume(plan: Plan, request: Request) -> Volume | None:
    """None: nobody can say."""
    if plan.run is None:
        return None
    from configs.costs import volume_of

    return volume_of(plan.run, dict(request.works))


def work_of(plan: Plan, found: Volume) -> str:
    """One name for all that decides how long a step takes, but for the machine."""
    spec = plan.spec
    said = {"stage": spec.stage, "ranks": spec.ranks, "nodes": spec.nodes, "gpu": spec.gpus > 0, "config": found.work}
    return digest(json.dumps(said, sort_keys=True).encode())


def question(plan: Plan, found: Volume | None, paths: Paths) -> dict[str, Any] | None:
    """For `Backend.prepare`."""
    return None if found is None else {"work": work_of(plan, found), "lists": list(_lists(found, paths).values())}


def answered(plan: Plan, found: Volume | None, paths: Paths, prepared: dict[str, Any]) -> tuple[Cost | None, Known]:
    """What a job comes to, by the answer of its node."""
    measure = prepared.get("measured")
    known = Known(Measure(**measure) if measure else None, prepared.get("free_bytes") or 0.0)
    if found is None:
        return None, known
    lists = _lists(found, paths)
    counts = {key: (prepared.get("counts") or {}).get(path) for key, path in lists.items()}
    return Cost(work=work_of(plan, found), steps=_steps(found, counts), evaluations=found.evaluations,
                val_samples=_least(found.val_samples, counts.get(found.validation)), checkpoints=found.checkpoints,
                growing=bool(found.source)), known


def after_change(cost: Cost | None, old: Resolved, new: Resolved) -> Cost | None:
    """Of a job whose config is changed. None: its steps are others now, and nobody has asked the node about them."""
    from configs.costs import volume_of

    before, after = volume_of(old, {}), volume_of(new, {})
    if cost is None or before is None or after is None or before.work != after.work:
        return None
    return replace(cost, steps=cost.steps if after.source else after.steps, evaluations=after.evaluations)


def _lists(found: Volume, paths: Paths) -> dict[str, str]:
    """The lists that are on the node already."""
    named = {key: paths.values[key] for key in (found.source, found.validation) if key in paths.values}
    return {key: path if path.endswith(".txt") else os.path.join(path, _LIST) for key, path in named.items()}


def _steps(found: Volume, counts: dict[str, dict[str, int] | None]) -> int | None:
    if not found.source:
        return found.steps
    counted = counts.get(found.source)
    if counted is None:
        return None
    return min(counted["samples"] * (counted["views"] if found.each_view else 1), found.limit or 1 << 62)


def _least(limit: int | None, counted: dict[str, int] | None) -> int | None:
    both = [one for one in (limit, counted and counted["samples"]) if one]
    return min(both) if both else None


# --- words --------------------------------------------------------------------------------------------------

def expected_of(cost: Cost | None, known: Known) -> Expected | None:
    return expected(cost, known.measure) if cost and known.measure else None


def told(cost: Cost | None, known: Known) -> str:
    """`~3 h 20 min (0.29 s a step, measured on gpu05, H100, 2 d ago); disk 12 GB, 800 GB free`; empty: nobody asks."""
    if cost is None:
        return ""
    if known.measure is None:
        return NOT_MEASURED
    found = expected(cost, known.measure)
    if found is None:
        return f"{measured(known.measure)}; how many there will be is not known yet"
    return f"~{lasting(found.seconds)} ({measured(known.measure)}); disk {disk(found.disk_bytes, known.free_bytes)}"


def measured(found: Measure) -> str:
    what = f"{found.step_s:.2g} s a step" if found.step_s else "all of it"
    return f"{what}, measured on {found.host}, {found.device}, {age(time.time() - found.t)} ago by {found.job}"


def disk(need: float, free: float) -> str:
    return f"{size(need)}, {size(free)} free" + ("" if need < free else ": TOO LITTLE")


def size(count: float) -> str:
    """`12 GB`, `3.4 MB`."""
    for unit, bound in (("TB", 1e12), ("GB", 1e9), ("MB", 1e6)):
        if count >= bound:
            return f"{count / bound:.3g} {unit}"
    return f"{count / 1e3:.3g} kB"
