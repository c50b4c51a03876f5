"""launch submit: pack, check, start."""
from __future__ import annotations

import shlex
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from launcher import api, group_sentences, sentences
from launcher.commands._common import UNKNOWN, add_progress, count, here, parser, positive, seconds, split_command, tell
from launcher.errors import Interrupted, Wrong
from launcher.groups import GroupDraft, Member
from launcher.logs import Which
from launcher.stages import Request

SHARED = "shared"
_CARRY_S = 2.0  # from one look at what a job that is not submitted yet waits for to the next
_FINDS_OUT = "launch status finds out within a minute"
_USAGE = "launch submit STAGE [options]\n       launch submit [options] -- CMD ARG..."


def run(argv: Sequence[str]) -> int:
    options, command = split_command(argv)
    args, words = _parser().parse_known_args(options)
    _refuse_loose(args.stage, words)
    if args.calibrate:
        _calibrate(args, command)
    with _interrupted("nothing was submitted"):
        ready = api.draft(_request(args, command), carry=args.follow)
    for note in ready.notes:
        tell(note)
    if isinstance(ready, GroupDraft):
        return _group(ready, args)
    if args.dry_run:
        print(sentences.draft(ready, api.command_lines(ready)))
        return 0
    with _interrupted(f"whether {ready.spec.id} was submitted is not known", _FINDS_OUT):
        job = api.send(ready)
    tell(sentences.submitted(job, ready.unset_secrets, following=args.follow))
    if not args.follow:
        print(job.id)
        return 0
    return _follow(job.id)


@contextmanager
def _interrupted(what: str, hint: str | None = None) -> Iterator[None]:
    """A Ctrl-C says what it leaves behind."""
    try:
        yield
    except KeyboardInterrupt:
        raise Interrupted(f"\n{what}", hint=hint) from None


def _calibrate(args, command: tuple[str, ...]) -> None:
    if not args.dry_run:
        raise Wrong("--calibrate goes with --dry-run: it measures, and submits nothing that stays")
    from launcher.calibrate import calibrate

    calibrate(_request(args, command), tell)


def _group(ready: GroupDraft, args) -> int:
    if args.dry_run:
        print(group_sentences.draft(ready, [api.command_lines(member.draft) for member in ready.members]))
        return 0
    with _interrupted(f"whether {ready.id} was submitted is not known", _FINDS_OUT):
        jobs = api.send_group(ready)
    tell(group_sentences.submitted(ready, jobs, following=args.follow))
    if not args.follow:
        print(ready.id)
        return 0
    return max([_follow_member(ready, member) for member in ready.members])


def _follow_member(ready: GroupDraft, member: Member) -> int:
    """The log of one job, once it is submitted -> its fate as an exit code."""
    try:
        while (job := api.with_token(member.spec.token)) is None:
            for note in api.advance():
                tell(note)
            if member.spec.token not in api.pending(ready.id) and api.with_token(member.spec.token) is None:
                return 1
            time.sleep(_CARRY_S)
    except KeyboardInterrupt:
        raise Interrupted(f"\n{member.spec.id} is not submitted yet; any launch command goes on with it",
                          hint=f"look: launch status\n  give it up: launch kill {ready.id}") from None
    if ready.kind != "job":
        tell(group_sentences.headline(ready, member))
    return _follow(job.id)


def _follow(job: str) -> int:
    from launcher.commands.logs import copy

    ended, _ = copy(api.logs(job, Which(attempt="all", follow=True), tell=tell, start=here()), job)
    tell(sentences.fate(ended))
    return int(ended.state != "COMPLETED")


def _refuse_loose(stage: str | None, words: Sequence[str]) -> None:
    """A command without its `--` is the likeliest mistake. Raises Wrong."""
    if words and not words[0].startswith("-"):
        raise Wrong(f"{words[0]}: a stage takes no further words",
                    hint=f"a command stands after `--`: launch submit -- {stage} {shlex.join(words)}")
    if words:
        _parser().error(UNKNOWN + " ".join(words))


def _request(args, command: tuple[str, ...]) -> Request:
    return Request(
        start=here(), stage=args.stage, argv=command, node=args.node, nodes=args.nodes,
        gpus=1 if args.gpus == SHARED else args.gpus, share=args.gpus == SHARED, no_wait=args.no_wait,
        force=args.force, no_check=args.no_check,
        config=args.config, after=tuple(args.after), sweeps=tuple(args.sweep), parallel=args.parallel,
        sets=tuple(args.set), name=args.name, resume=args.resume, max_restarts=args.max_restarts,
        time_s=seconds("--time", args.time), grace_s=seconds("--grace", args.grace), cwd=args.cwd,
        progress=tuple(args.progress))


def _parser():
    p = parser("submit", "Start a stage, or any command, as a job. Prints its id and nothing else on stdout.",
               _USAGE)
    p.add_argument("stage", nargs="?", metavar="STAGE", help="a file of configs/stages, as in phase3")
    p.add_argument("--node", default="local", metavar="N",
                   help="where: a node of cluster.yaml; a SLURM cluster of it (lab), a partition (lab:gpu) or a "
                        "machine of one (gpu05); N1,N2: these as one torchrun world; any: the first that can take "
                        "it now; default: local, this computer")
    p.add_argument("--nodes", type=positive, metavar="N",
                   help="machines of a SLURM cluster that are one torchrun world")
    p.add_argument("--gpus", type=lambda text: text if text == SHARED else count(text), metavar="N|shared",
                   help="how many GPUs on each node; shared: one, with other jobs that say so; default: what the stage "
                        "says, none for a command")
    p.add_argument("--no-wait", action="store_true",
                   help="when its GPUs are taken, say by whom and exit with 4, instead of waiting for them")
    p.add_argument("--config", metavar="RUN", help="a run file by its name or path; default: the stage's own")
    p.add_argument("--set", action="append", default=[], metavar="A.B=V",
                   help="change the config; may stand several times")
    p.add_argument("--after", action="append", default=[], metavar="JOB[:any]",
                   help="begin when JOB has completed, with :any however it ended; may stand several times")
    p.add_argument("--sweep", action="append", default=[], metavar="A.B=V1,V2",
                   help="one job for each value, named by --name; several make all combinations")
    p.add_argument("--parallel", type=positive, metavar="N", help="so many points of a sweep at a time")
    p.add_argument("--name", metavar="X", help="a name for the job, unique among those not ended")
    p.add_argument("--resume", default="auto", metavar="auto|never|JOB|PATH",
                   help="begin from a job's newest checkpoint, or from this one")
    p.add_argument("--max-restarts", type=count, metavar="N", help="how often to try again after a failure")
    p.add_argument("--time", metavar="24h", help="stop it after this long")
    p.add_argument("--grace", metavar="60s", help="how long it may take to save when it is stopped")
    p.add_argument("--cwd", metavar="DIR",
                   help="a command runs in this directory of the node; nothing is copied")
    add_progress(p, "a command's output")
    p.add_argument("--force", action="store_true", help="also where less than 1 GB or 10,000 inodes are free")
    p.add_argument("--no-check", action="store_true",
                   help="start it although its inputs may be wrong: launch check says what it would look at")
    p.add_argument("--dry-run", action="store_true", help="say what would be run, and start nothing")
    p.add_argument("--calibrate", action="store_true",
                   help="with --dry-run: first run a few steps on the node, to say how long it will take")
    p.add_argument("--follow", action="store_true",
                   help="then print its log; the exit code is the job's fate")
    return p
