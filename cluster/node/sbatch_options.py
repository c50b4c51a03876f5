"""From a job to the options of sbatch, by their long names. Pure."""
from __future__ import annotations

import hashlib
import math
import os
import re
from collections.abc import Mapping, Sequence

from cluster.errors import Unusable
from cluster.node.environment import clean
from cluster.node.machines import Machine, of_partition
from cluster.spec import JobSpec

Options = dict[str, str | int | bool]

WARN_S = 120.0  # how long before the end of an allocation its job is warned; at most half of the limit
CPUS_PER_GPU_MAX = 16
_GPU_OPTIONS = ("gpus", "gpus-per-node", "gpus-per-task", "gpus-per-socket")
_CPU_OPTIONS = ("cpus-per-task", "cpus-per-gpu", "exclusive", "mincpus")


def mark(token: str) -> str:
    """The beginning of the job's comment: it is found by that when the answer of sbatch was lost.

    Not the token itself: everybody on the cluster may read a comment, and who knows the token may lead its nodes.
    """
    return f"launch:{hashlib.sha256(token.encode()).hexdigest()[:16]}"


def options_of(spec: JobSpec, directory: str, machines: Sequence[Machine] = (),
               dependency: str | None = None) -> Options:
    """`directory`: where the batch script begins. Raises Unusable: more time than the partition gives, or an option
    that no script can hold.
    """
    slurm = spec.slurm
    assert slurm is not None, spec.id
    given = {name.lstrip("-").replace("_", "-"): value for name, value in slurm.options.items()}
    given = {name: value for name, value in given.items() if value is not False}
    partition = slurm.partition or _text(given.get("partition"))
    there = of_partition(machines, partition)
    _check_time(spec, there)
    comment = given.pop("comment", "")
    ours: Options = {
        "job-name": spec.id, "comment": f"{mark(spec.token)} {comment}".strip(), "nodes": spec.nodes,
        "ntasks-per-node": 1, "signal": f"USR1@{_warning_s(spec)}", "open-mode": "append",
        "kill-on-invalid-dep": "yes", "chdir": directory}
    wanted = {"partition": slurm.partition, "nodelist": slurm.nodelist, "dependency": dependency,
              "time": math.ceil(spec.time_s / 60) if spec.time_s else None,
              "requeue": True if "no-requeue" not in given else None}
    ours |= {name: value for name, value in wanted.items() if value}
    if not any(name in given for name in _CPU_OPTIONS):
        ours["cpus-per-task"] = _cpus(spec, [one for one in there if slurm.nodelist in (None, one.name)])
    found = given | _gpus(spec.gpus, given) | ours
    if broken := next((name for name, value in found.items() if "\n" in str(value)), None):
        raise Unusable(f"--{broken} of sbatch would hold a line break: {found[broken]!r}",
                       hint="a script's options stand on one line each")
    return found


def environment(options: Mapping[str, object]) -> dict[str, str]:
    """What sbatch is started with: ours, without what would overrule `options` (SBATCH_PARTITION goes over the
    script's), and without what belongs to an allocation or a job that this process may itself be in."""
    given = {f"SBATCH_{name.replace('-', '_').upper()}" for name in options}
    given |= {"SBATCH_TIMELIMIT", "SBATCH_JOB_NAME", "SBATCH_NO_REQUEUE", "SBATCH_ARRAY_INX", "SBATCH_EXPORT"}
    return {name: value for name, value in clean(os.environ).items()
            if name == "SLURM_CONF" or name not in given and not name.startswith(("SLURM_", "SRUN_", "SUBMITIT_"))}


def _warning_s(spec: JobSpec) -> int:
    wanted = max(WARN_S, spec.grace_s or 0.0)
    return max(1, int(wanted if spec.time_s is None else min(wanted, spec.time_s / 2)))


def _gpus(wanted: int, given: Options) -> Options:
    """Every SLURM understands `gres`; a person may have given its type (`gres: gpu:a100`) or all of it."""
    gres = _text(given.get("gres")) or ""
    if not wanted or any(name in given for name in _GPU_OPTIONS) or re.search(r"\bgpu(:[^,:]+)?:\d+", gres):
        return {}
    if re.search(r"\bgpu\b", gres):
        return {"gres": re.sub(r"\bgpu(:[^,:]+)?", lambda found: f"{found[0]}:{wanted}", gres)}
    return {"gres": f"{gres},gpu:{wanted}".lstrip(",")}


def _cpus(spec: JobSpec, there: Sequence[Machine]) -> int:
    """The share of a machine's CPUs that goes with its GPUs; without any, one for each process."""
    if not spec.gpus:
        return spec.ranks
    shares = [one.cpus // one.gpus for one in there if one.gpus >= spec.gpus]
    return spec.gpus * max(1, min([*shares, CPUS_PER_GPU_MAX])) if shares else spec.gpus


def _check_time(spec: JobSpec, there: Sequence[Machine]) -> None:
    """SLURM would take such a job and let it wait for ever."""
    limits = [one.limit_s for one in there if one.limit_s is not None]
    if spec.time_s and limits and len(limits) == len(there) and spec.time_s > max(limits):
        longest = f"{max(limits) / 60:g}"
        raise Unusable(f"a job gets {longest} minutes at most in partition {there[0].partition}, this one asks for "
                       f"{spec.time_s / 60:g}",
                       hint=f"--time {longest}m is enough: the job goes on in the next allocation by itself")


def _text(value: str | int | bool | None) -> str | None:
    return None if value is None else str(value)
