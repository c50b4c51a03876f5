"""What is said about one thing that was or would be done: submitted, killed, restarted, ended, a dry run."""
from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from launcher import estimates
from launcher.views import age, cause, visible

if TYPE_CHECKING:
    from launcher.adopt import Adopted
    from launcher.control import Killed
    from launcher.jobs import JobStatus
    from launcher.restart import Restarted, RestartPlan
    from launcher.submit import Draft, Submitted


def submitted(job: Submitted, unset_secrets: Sequence[str], following: bool) -> str:
    queued = f", SLURM job {job.slurm_id}" if job.slurm_id else ""
    lines = [f"{job.id} on {job.place or job.node}{queued}: {job.run_dir}"]
    if unset_secrets:
        lines.append(f"  not set here: {', '.join(unset_secrets)}; "
                     f"the job gets what {job.node} was given before, if any")
    lines.append(f"  Ctrl-C leaves it alone; stop it: launch kill {job.id}" if following else _go_on(job.id))
    return "\n".join(lines)


def _go_on(job: str) -> str:
    return f"  follow it: launch logs -f {job}; stop it: launch kill {job}"


def adopted(job: Adopted) -> str:
    """What was taken over, so that a person sees whether it is what they meant."""
    gpus = f", GPU {', '.join(map(str, job.gpus))}" if job.gpus else ""
    rows = [("runs", visible(shlex.join(job.argv))), ("in", visible(job.cwd)), ("log", visible(job.log or ""))]
    if job.secrets:
        rows.append(("secrets", f"{', '.join(job.secrets)}: kept on the node, shown nowhere"))
    count = f"{job.processes} process{'' if job.processes == 1 else 'es'}"
    return "\n".join([f"{job.id} on {job.node}: process {job.root} and what it starts, {count} now{gpus}",
                      *(f"  {title:8}{value}" for title, value in rows if value), *(f"  {note}" for note in job.notes),
                      _go_on(job.id), f"  the same command in the same directory again: launch restart {job.id}"])


def fate(job: JobStatus) -> str:
    """One line about how a job ended, and one about what to do then."""
    line = f"{job.id} {job.state}"
    if job.state != "COMPLETED" and job.reason:
        line += f": {visible(cause(job))}"
    if job.state != "COMPLETED" and job.checkpoint_step is not None:
        line += f"\n  from its checkpoint at step {job.checkpoint_step}: launch restart {job.id}"
    return line


def silent(job: JobStatus, grep: str | None) -> str:
    """Why a log shows nothing."""
    if grep is not None:
        return "no line matches"
    return f"nothing was printed; {fate(job)}"


def killed(result: Killed) -> str:
    line = f"{result.id} {result.state}"
    if result.already:
        line += " (it had already ended)" if result.had_ended else " (its end had already been asked for)"
    if result.checkpoint_step is not None:
        line += f", checkpoint at step {result.checkpoint_step}"
    freed = [f"{result.processes} process{'' if result.processes == 1 else 'es'}"] if result.processes else []
    freed += [f"{result.gpu_mb / 1000:.1f} GB of GPU memory"] if result.gpu_mb else []
    line += f", freed {' and '.join(freed)}" if freed else ""
    left = "".join(f"\n  still there: {pid} {visible(command)}" for pid, command in result.survivors)
    return line + (f"\n  {visible(result.note)}" if result.note else "") + left


def restart_plan(plan: RestartPlan, asked: bool) -> str:
    """The config diff, shown before anything is stopped."""
    lines = [f"  {key}: {_value(old)} -> {_value(new)}" for key, old, new in plan.changes]
    if asked and not lines:
        lines = ["  the config stays as it is: it has these values already"]
    if plan.code and plan.spec:
        commit = _commit(plan.spec.code.git_sha, plan.spec.code.dirty)
        lines.append(f"  fresh code: {len(plan.code.files)} files{commit}")
    if plan.gives_up:
        lines.insert(0, f"  gives up {plan.gives_up}")
    if plan.move:
        return "\n".join([f"moving {plan.job.id} from {plan.job.node} to {plan.move.to.name}", *lines,
                          f"  {plan.move.told()}"])
    return "\n".join([f"restarting {plan.job.id} on {plan.job.node}", *lines])


def restarted(done: Restarted) -> str:
    if done.slurm_id:
        start = f"in SLURM's queue as {done.slurm_id}"
    elif done.waits:
        start = f"when it need not wait any more: {done.waits}"
    elif done.resume_step is not None:
        start = f"from step {done.resume_step}"
    elif done.resume or done.anew:
        start = f"from {done.resume}" if done.resume else "from the start"
    else:
        start = "from the start: it has no checkpoint to go on from"
    stays = f"\n  left where it was: {', '.join(done.stays)}" if done.stays else ""
    return f"{done.id} on {done.node}: attempt {done.attempt}, {start}{stays}\n{_go_on(done.id)}"


def draft(ready: Draft, command_lines: list[list[str]]) -> str:
    """What `--dry-run` prints."""
    spec = ready.spec
    takes = f"GPUs: {spec.gpus}" if spec.gpus else "on the CPU"
    if spec.kind == "torchrun" and not spec.gpus:  # how many a command starts is its own affair
        takes = f"processes: {spec.ranks}, {takes}"
    takes += f", on each of {spec.nodes} machines" if spec.nodes > 1 else ""
    rows = [("job", spec.id + (f" ({spec.name})" if spec.name else "")),
            ("node", f"{spec.place}, {takes}")]
    if spec.time_s:
        rows.append(("time", age(spec.time_s)))
    if takes := estimates.told(spec.cost, ready.known):
        rows.append(("takes", takes))
    rows += [("runs", shlex.join(line)) for line in command_lines]
    rows.append(("code", _code(ready)))
    if spec.resume_rule.kind != "none":
        rows.append(("resume", spec.resume))
    if spec.secrets:
        rows.append(("secrets", ", ".join(
            name + (" (not set here)" if name in ready.unset_secrets else "") for name in spec.secrets)))
    rows.append(("restarts", str(spec.restart.max_restarts)))
    text = "\n".join(f"{title:9} {value}" for title, value in rows)
    text += f"\n\n# what sbatch is given\n{ready.script.rstrip()}" if ready.script else ""
    return text + (f"\n\n# config.yaml\n{ready.config.rstrip()}" if ready.config else "")


def _code(ready: Draft) -> str:
    if ready.code is None:
        return f"{ready.spec.cwd} as it is"
    there = ", on the node already" if ready.have_code else ""
    return (f"{len(ready.code.files)} files of {ready.code.root}, {ready.code.size / 1e6:.1f} MB"
            + _commit(ready.spec.code.git_sha, ready.spec.code.dirty) + there)


def _commit(sha: str | None, dirty: bool) -> str:
    return f", {sha[:10]}{' with changes' if dirty else ''}" if sha else ""


def _value(value: Any) -> str:
    return visible(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
