"""`launch nodes` and `launch ps` as text."""
from __future__ import annotations

import shlex
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

from launcher.census import NodeReport
from launcher.views import aligned, cut, first_line, visible

FREE_MB = 512  # a GPU with more than this in use is somebody's
_NUMBERS = ("memory", "use", "gpu", "pid", "disk free", "load")
_UNKNOWN = "?"


def nodes_text(reports: Sequence[NodeReport], columns: int | None = None) -> str:
    """A line per node and SLURM partition, then a line per GPU; equal neighbours share one."""
    rows = [row for report in reports for row in _node_rows(report)]
    text = _table(rows, ("node", "gpus", "disk free", "load", "jobs", "remark"), columns)
    gpus = [row for report in reports for row in _gpu_rows(report)]
    return text + ("\n\n" + _table(gpus, ("node", "gpu", "model", "memory", "use", "who"), columns) if gpus else "")


def processes_text(found: Sequence[dict[str, Any]], columns: int | None = None) -> str:
    rows = [{"gpu": "" if one["gpu"] is None else str(one["gpu"]), "pid": str(one["pid"]), "user": one["user"],
             "since": _since(one["since"]), "memory": gigabytes(one["memory_mb"]), "job": one["job"] or "",
             "command": visible(shlex.join(one["command"]))} for one in found]
    return _table(rows, ("gpu", "pid", "user", "since", "memory", "job", "command"), columns)


def gigabytes(megabytes: float | None) -> str:
    if megabytes is None:
        return _UNKNOWN
    return f"{megabytes / 1024:.{0 if megabytes >= 10240 else 1}f} GB" if megabytes >= 1024 else f"{megabytes:.0f} MB"


def room(size: float) -> str:
    """Bytes of a disk."""
    return f"{size / 1e12:.1f} TB" if size >= 1e12 else f"{size / 1e9:.{0 if size >= 1e10 else 1}f} GB"


def gpus_free(found: Iterable[dict[str, Any]]) -> int:
    """Without a process, a lease, or memory that somebody has taken. Where the users are not known none is called free.
    """
    return sum(_who(gpu) == "free" for gpu in found)


def _node_rows(report: NodeReport) -> list[dict[str, str]]:
    jobs = ", ".join(job["name"] or job["id"] for job in report.jobs)
    if report.census is None:
        return [{"node": report.name, "remark": visible(first_line(report.problem)), "jobs": jobs}]
    said = report.census
    remark = said["gpu_problem"] and f"GPUs not known: {said['gpu_problem']}" or \
        said["slurm_problem"] and f"SLURM not known: {said['slurm_problem']}"
    own = {"node": report.name, "gpus": _gpus(said), "disk free": room(said["disk"]["free_bytes"]),
           "load": f"{said['load'][0]:.1f} of {said['cpus']}", "jobs": jobs, "remark": visible(first_line(remark))}
    return [own, *_partition_rows(report.name, said["machines"])]


def _gpus(said: dict[str, Any]) -> str:
    if said["gpu_problem"] and not said["gpus"]:
        return _UNKNOWN
    return f"{gpus_free(said['gpus'])} of {len(said['gpus'])} free" if said["gpus"] else "none"


def _partition_rows(name: str, machines: Sequence[dict[str, Any]]) -> list[dict[str, str]]:
    """A line per partition: how many machines are in which state."""
    rows = []
    for partition in dict.fromkeys(one["partition"] for one in machines):
        there = [one for one in machines if one["partition"] == partition]
        states = Counter(one["state"] for one in there)
        count = ", ".join(f"{number} {state}" for state, number in states.most_common())
        rows.append({"node": f"{name}:{partition}", "gpus": str(sum(one["gpus"] for one in there) or "none"),
                     "remark": f"{len(there)} machine{'' if len(there) == 1 else 's'}: {count}"
                               + ("; the default" if there[0]["default"] else "")})
    return rows


def _gpu_rows(report: NodeReport) -> list[dict[str, str]]:
    rows: list[dict[str, str]] = []
    for gpu in (report.census or {}).get("gpus", ()):
        row = {"node": report.name, "gpu": str(gpu["index"]), "model": visible(gpu["name"]),
               "memory": f"{gpu['used_mb'] / 1024:.0f} of {gpu['memory_mb'] / 1024:.0f} GB",
               "use": _UNKNOWN if gpu["utilization"] is None else f"{gpu['utilization']} %", "who": _who(gpu)}
        if rows and row["who"] == "free" and {**rows[-1], "gpu": ""} == {**row, "gpu": ""}:
            rows[-1]["gpu"] = f"{rows[-1]['gpu'].partition('-')[0]}-{row['gpu']}"
        else:
            rows.append(row)
    return rows


def _who(gpu: dict[str, Any]) -> str:
    if gpu["users"] is None:
        return _UNKNOWN
    if not gpu["users"] and gpu["leases"]:
        return "; ".join(visible(f"{one['user']} has it for {one['job']} since {_since(one['since'])}")
                         for one in gpu["leases"])
    if not gpu["users"]:
        return "free" if gpu["used_mb"] < FREE_MB else "memory is in use by a process that is not shown"
    return "; ".join(_user(one) for one in gpu["users"])


def _user(one: dict[str, Any]) -> str:
    job = f" ({one['job']})" if one["job"] else ""
    since = f" since {_since(one['since'])}" if one["since"] else ""
    return visible(f"{one['user']} pid {one['pid']} {one['program']} {gigabytes(one['memory_mb'])}{since}{job}")


def _since(moment: float | None) -> str:
    """Local time; with the day when that is not today."""
    if moment is None:
        return _UNKNOWN
    there, now = time.localtime(moment), time.localtime()
    return time.strftime("%H:%M" if there[:3] == now[:3] else "%d %b %H:%M", there)


def _table(rows: Sequence[dict[str, str]], titles: Sequence[str], columns: int | None) -> str:
    """Columns that are empty everywhere are left out; the last one is cut at the terminal's width."""
    table = {title: [row.get(title, "") for row in rows] for title in titles}
    table = {title: cells for title, cells in table.items() if any(cells) or title == titles[0]}
    lines = aligned(table, _NUMBERS).splitlines()
    return "\n".join(line if columns is None else cut(line, columns) for line in lines)
