"""What SLURM's programs say when they do not do what was asked, as an error for a person with its exit code."""
from __future__ import annotations

import re
from collections.abc import Mapping

from cluster.errors import ClusterError, Refused, Unreachable, Unusable

_YAML = "correct `sbatch:` of the node in cluster.yaml, or `resources: {sbatch: …}` of the stage"

# (what it says, kind, in a person's words, what to do then). {option}: the value that was asked for.
_KNOWN: tuple[tuple[str, type[ClusterError], str, str | None], ...] = (
    (r"unable to contact slurm controller|slurmctld.*(timed out|not respond)|socket timed out|did not answer in"
     r"|connection (refused|reset|timed)|zero bytes were transmitted|backup controller in standby"
     r"|unexpected message|resource temporarily unavailable|unable to (resolve|establish)|no route to host"
     r"|communication (connection )?failure|submission.*disabled",
     Unreachable, "SLURM's controller does not answer", "try again in a minute; jobs that run go on meanwhile"),
    (r"munge|authentication|invalid.*credential", Unreachable, "SLURM does not know who you are",
     "tell the administrator of the cluster: munge does not run on the login node"),
    (r"there is no (?P<named>\w+) on the PATH of (?P<host>\S+)", Unusable, "{host} has no {named}",
     "`login:` in cluster.yaml names the machine that has SLURM's programs; `here` means this one"),
    (r"establish a configuration source", Unusable, "this machine belongs to no SLURM cluster",
     "`login:` in cluster.yaml names the machine that does; `here` means this one"),
    (r"unrecognized option '?-*(?P<named>[\w-]+)", Unusable, "sbatch has no option --{named}", _YAML),
    (r"option '?-*(?P<named>[\w-]+).*(requires|doesn't allow) an argument", Unusable,
     "the option --{named} of sbatch was given wrongly", _YAML),
    (r"invalid partition", Unusable, "there is no {where}",
     "sinfo -s on the cluster shows them; name one with --node CLUSTER:PARTITION"),
    (r"invalid account", Unusable, "you may not use the account {account} in {where}", _YAML),
    (r"invalid qos", Unusable, "you may not use the qos {qos}", _YAML),
    (r"invalid feature", Unusable, "no node has the constraint {constraint}", _YAML),
    (r"invalid node name", Unusable, "there is no such node: nodelist {nodelist}, exclude {exclude}", _YAML),
    (r"reservation", Unusable, "the reservation {reservation} cannot be used", _YAML),
    (r"job array", Unusable, "so many points at once are more than this SLURM allows",
     "scontrol show config on the cluster shows MaxArraySize; divide the sweep"),
    (r"time limit", Unusable, "a time limit of {time} minutes is not possible in {where}",
     "a shorter --time is enough: the job goes on in the next allocation"),
    (r"mem(ory)? specification|invalid --mem", Unusable, "the memory asked for cannot be read: {mem}", _YAML),
    (r"invalid (generic resource|gres|trespec|tres)", Unusable, "this SLURM knows no {gres}", _YAML),
    (r"configuration (is )?not available|more processors", Unusable,
     "{where} has no nodes for so much at once: {sizes}",
     "sinfo -N -o '%N %P %c %m %G' on the cluster shows what there is; ask for less, or another partition"),
    (r"policy|limit|too many jobs", Refused, "a limit of your account or qos is in the way",
     "wait until your other jobs have ended, or ask for less"),
    (r"not permitted|permission denied|access denied|not available to", Refused,
     "you may not submit to {where}", "choose another with --node CLUSTER:PARTITION"),
    (r"dependency", Unusable, "the dependency {dependency} is refused", None),
)
_SIZES = ("nodes", "nodelist", "gres", "gpus", "gpus-per-node", "cpus-per-task", "mem", "time")


def refusal(said: str, options: Mapping[str, object]) -> ClusterError:
    """The error for what one of SLURM's programs `said` when it was asked with `options`."""
    words = last_words(said)
    for pattern, kind, what, hint in _KNOWN:
        if found := re.search(pattern, said, re.IGNORECASE):
            asked = _Asked(options, found.groupdict())
            return kind(f"{what.format_map(asked)} (SLURM: {words})", hint=hint)
    return Unusable(f"SLURM refuses it: {words}")


def last_words(said: str) -> str:
    """The line that says it, without the program's name."""
    lines = [line.strip() for line in said.splitlines() if line.strip() and not line.startswith("Try ")]
    return re.sub(r"^(\w+: )?((fatal|error): )?", "", lines[-1], count=1) if lines else "nothing"


class _Asked(dict[str, str]):
    """What was asked for, by sbatch's words, and what SLURM itself named."""

    def __init__(self, options: Mapping[str, object], named: Mapping[str, str | None]) -> None:
        super().__init__({key: str(value) for key, value in options.items()})
        self.update({key: value or "?" for key, value in named.items()})
        self["where"] = f"partition {options['partition']}" if options.get("partition") else "the default partition"
        self["sizes"] = ", ".join(f"{key} {options[key]}" for key in _SIZES if key in options)

    def __missing__(self, key: str) -> str:
        return "(the default)" if key in ("account", "qos") else "(none)"
