"""Jobs on their way into SLURM's queue: all or nothing, exactly once, and what is asked first."""
from __future__ import annotations

import getpass
import json
import os
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from cluster import wire
from cluster.backends.host import HostBackend
from cluster.errors import Refused, Unreachable, Unusable
from cluster.events import AttemptEnded, AttemptStarted, Reason
from cluster.inventory import Node
from cluster.node import process, sbatch
from cluster.node.sbatch_options import mark
from cluster.spec import After, Group, JobSpec, Slurm
from tests.cluster.jobs import command
from tests.helpers import wait_until
from tests.node.scheduled import queued, slurm_run
from tests.node.test_cancel import slurm_reacts
from tests.slurm.fake import FakeSlurm
from tests.slurm.recorded import Answer

ENDED = AttemptEnded(20.0, Reason.DONE, "", 0, 7, None, None, "end", None)
FAILED = AttemptEnded(20.0, Reason.ERROR, "KeyError", 1, 7, None, None, "end", None)
LOST = Answer(stderr="sbatch: error: Batch job submission failed: Socket timed out on send/recv operation\n", code=1)


def started(slurm_id: str) -> AttemptStarted:
    return AttemptStarted(10.0, 0, "submit", "gpu01", "boot", 4, 5, (), None, None, slurm_id, 0)


@pytest.fixture
def slurm(fake_slurm: FakeSlurm) -> FakeSlurm:
    """submitit looks for an srun, which only jobs call."""
    (fake_slurm.bin / "srun").symlink_to("/bin/false")
    return fake_slurm


@pytest.fixture
def lab(slurm: FakeSlurm, tmp_path: Path) -> HostBackend:
    """The cluster whose login node this computer is."""
    return HostBackend(Node("lab", "slurm", "here", workdir=str(tmp_path / "it's $W"), agent_python=sys.executable))


def job(*argv: str, **more: object) -> JobSpec:
    return command(*(argv or ("true",)), **{"slurm": Slurm("main"), "node": "lab", **more})


def in_queue(id: str, spec: JobSpec, **changed: str) -> dict[str, str]:
    return queued(id, UserName=getpass.getuser(), **{"Name": spec.id, "Comment": mark(spec.token), **changed})


def ids(run_dir: str) -> list[str]:
    return json.loads((Path(run_dir) / "slurm.json").read_bytes())["ids"]


def runs(lab: HostBackend) -> list[str]:
    return sorted(path.name for path in Path(lab.node.workdir, "runs").iterdir() if not path.name.startswith("."))


def test_a_job_is_queued_once_with_everything_that_was_asked_for(lab: HostBackend, slurm: FakeSlurm) -> None:
    spec = job(gpus=2, time_s=600, slurm=Slurm("main", None, {"mem": "4G"}))
    run = lab.submit(spec, "a: 1\n", {})
    assert (run["id"], run["pid"], run["attempt"], run["slurm_id"]) == (spec.id, None, 0, "101")
    assert ids(run["run_dir"]) == ["101"]
    script = Path(run["run_dir"], "slurm", "101_submission.sh").read_text()
    for line in ("--partition=main", "--gres=gpu:2", "--cpus-per-task=4", "--mem=4G", "--time=10", "--requeue",
                 f"--job-name={spec.id}", f"--comment={mark(spec.token)}", "--kill-on-invalid-dep=yes"):
        assert f"#SBATCH {line}\n" in script, script
    assert spec.token not in script  # squeue shows options to everybody
    assert lab.submit(spec, "a: 1\n", {}) == run
    assert lab.find([spec.token])[0]["run_dir"] == run["run_dir"]
    assert slurm.count()["sbatch"] == 1


def test_what_submitit_carries_is_our_supervisors_command_line_and_nothing_else(lab: HostBackend) -> None:
    run = lab.submit(job(), None, {})
    loaded = ("import pickle, sys; job = pickle.load(open(sys.argv[1], 'rb')); "
              "print(job.function.__module__, job.function.__name__, *job.args[1][1:3], *job.args[1][-2:])")
    pickled = Path(run["run_dir"], "slurm", "101_submitted.pkl")
    said = subprocess.run([sys.executable, "-c", loaded, str(pickled)], capture_output=True, text=True, check=True)
    assert said.stdout == f"posix execv -I -S allocated {run['run_dir']}\n"


def test_a_refused_job_leaves_nothing_behind(lab: HostBackend, slurm: FakeSlurm) -> None:
    slurm.say("sbatch", "sbatch.impossible")
    spec = job(gpus=9)
    with pytest.raises(Unusable, match="partition main has no nodes for so much at once: nodes 1, gres gpu:9"):
        lab.submit(spec, None, {})
    assert runs(lab) == [] and lab.find([spec.token])[0]["id"] is None


def test_a_job_whose_answer_was_lost_is_found_by_name_and_token_and_not_queued_again(
        lab: HostBackend, slurm: FakeSlurm) -> None:
    spec = job()
    slurm.say("sbatch", LOST)
    with pytest.raises(Unreachable, match="SLURM's controller does not answer"):
        lab.submit(spec, None, {})
    slurm.jobs(in_queue("6", spec, Comment="launch:another"), in_queue("7", spec, Comment=f"{mark(spec.token)} x"))
    found = lab.submit(spec, None, {})
    assert (found["slurm_id"], slurm.count()["sbatch"]) == ("7", 1)
    assert ids(found["run_dir"]) == ["7"]


def test_a_job_that_slurm_never_got_is_gone_at_the_next_look(lab: HostBackend, slurm: FakeSlurm) -> None:
    spec = job()
    slurm.say("sbatch", LOST)
    with pytest.raises(Unreachable):
        lab.submit(spec, None, {})
    slurm.say("squeue", "squeue.controller-down")
    assert "controller does not answer" in lab.find([spec.token])[0]["unasked"]
    assert runs(lab) == [spec.id]  # could not ask: nothing is touched
    slurm.say("squeue", "squeue.empty")
    assert lab.find([spec.token])[0] == {"run_dir": None, "id": None, "unasked": ""}
    assert runs(lab) == []


def sbatch_lives(slurm: FakeSlurm) -> bool:
    return any({str(slurm.bin.parent), "sbatch"} <= set(process.command_of(pid)) for pid in process.process_table())


def test_an_sbatch_that_does_not_answer_is_ended_before_the_job_is_given_up(
        lab: HostBackend, slurm: FakeSlurm, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sbatch, "SUBMIT_S", 3.0)
    slurm.say("sbatch", Answer("77\n", hang_s=60))
    with pytest.raises(Unreachable, match="no answer in 3 s"):
        lab.submit(job(), None, {})
    assert slurm.count()["sbatch"] == 1
    wait_until(lambda: not sbatch_lives(slurm), 2, "sbatch to be gone")


@pytest.mark.filterwarnings("ignore:subprocess .* is still running:ResourceWarning")  # it goes on, as it should
def test_a_submit_that_was_interrupted_is_looked_for_when_sbatch_has_answered(
        lab: HostBackend, slurm: FakeSlurm) -> None:
    spec = job()
    slurm.say("sbatch", Answer("77\n", hang_s=2))
    slurm.jobs(in_queue("77", spec))

    def interrupt() -> None:
        wait_until(lambda: sbatch_lives(slurm), 20, "sbatch")
        os.kill(os.getpid(), signal.SIGINT)

    thread = threading.Thread(target=interrupt)
    thread.start()
    with pytest.raises(KeyboardInterrupt):
        lab.submit(spec, None, {})
    thread.join()
    assert sbatch_lives(slurm)
    assert lab.find([spec.token])[0]["id"] == spec.id and not sbatch_lives(slurm)
    assert ids(f"{lab.node.workdir}/runs/{spec.id}") == ["77"]


def test_without_submitit_it_is_said_how_to_install_it(lab: HostBackend, monkeypatch: pytest.MonkeyPatch,
                                                      tmp_path: Path) -> None:
    (tmp_path / "shadow").mkdir()
    (tmp_path / "shadow" / "submitit.py").write_text("raise ImportError('no submitit')")
    monkeypatch.setenv("PYTHONPATH", str(tmp_path / "shadow"))
    with pytest.raises(Unusable) as error:
        lab.prepare(slurm=job())
    assert "-m pip install" in str(error.value) and "submitit" in str(error.value)


def test_before_anything_is_queued_slurm_is_asked_and_the_script_is_shown(lab: HostBackend, slurm: FakeSlurm) -> None:
    starts = time.strftime("%Y-%m-%dT%H:%M:%S", time.localtime(time.time() + 3600))
    slurm.say("sbatch", Answer(stderr=f"sbatch: Job 5 to start at {starts} using 4 processors on nodes gpu[01-04] in partition main\n"))
    told = lab.prepare(slurm=job(gpus=1))["slurm"]
    assert 3590 < told["starts_in_s"] <= 3600 and told["nodes"] == "gpu[01-04]"
    assert told["script"].startswith("#!/bin/bash\n") and "#SBATCH --gres=gpu:1\n" in told["script"]
    assert runs(lab) == []
    slurm.say("sbatch", "test-only.account")
    with pytest.raises(Unusable, match="account"):
        lab.prepare(slurm=job(slurm=Slurm("main", None, {"account": "nix"})))


def test_points_of_a_sweep_are_one_array_and_found_by_their_number(lab: HostBackend, slurm: FakeSlurm) -> None:
    points = [job("echo", str(n), id=f"swept-7kq-{n}", group=Group("swept", "sweep", str(n), 3, 2)) for n in range(3)]
    submitted = lab.submit_array(points, [f"n: {n}\n" for n in range(3)], {}, parallel=2)
    assert [one["slurm_id"] for one in submitted] == ["101_0", "101_1", "101_2"]
    script = Path(lab.node.workdir, ".launch", "slurm", "swept-7kq", "101_submission.sh").read_text()
    assert "#SBATCH --array=0-2%2\n" in script and "#SBATCH --job-name=swept-7kq\n" in script
    assert Path(submitted[1]["run_dir"], "config.yaml").read_text() == "n: 1\n"
    assert lab.submit_array(points, [None] * 3, {}) == submitted
    for one in submitted:  # as if the answer of sbatch had been lost
        number = submitted.index(one)
        array = {"name": "swept-7kq", "token": points[0].token, "index": number}
        Path(one["run_dir"], "slurm.json").write_text(json.dumps({"ids": [], "array": array}))
    slurm.jobs(*(in_queue(f"55_{n}", points[0], Name="swept-7kq") for n in range(3)))
    asked = slurm.count()["squeue"]
    assert [one["id"] for one in lab.find([point.token for point in points])] == [one["id"] for one in submitted]
    assert slurm.count()["squeue"] == asked + 1
    assert [one["slurm_id"] for one in lab.submit_array(points, [None] * 3, {})] == ["55_0", "55_1", "55_2"]
    assert slurm.count()["sbatch"] == 1


def test_a_refused_array_leaves_nothing_behind(lab: HostBackend, slurm: FakeSlurm) -> None:
    slurm.say("sbatch", "sbatch.impossible")
    with pytest.raises(Unusable):
        lab.submit_array([job(), job()], [None, None], {})
    assert runs(lab) == []


def test_slurm_waits_for_jobs_it_knows_and_not_for_those_that_have_completed(lab: HostBackend, slurm: FakeSlurm) -> None:
    workdir = Path(lab.node.workdir)
    done = slurm_run(workdir, "done", [started("3"), ENDED], ["3"])
    waiting = slurm_run(workdir, "waiting", [], ["4"], started=False)
    slurm.jobs(queued("4"))
    after = [After("done", str(done.path)), After("waiting", str(waiting.path)), After("waiting", str(waiting.path), True)]
    assert sbatch.dependency_of(job(after=tuple(after))) == "afterok:4,afterany:4"
    failed = slurm_run(workdir, "failed", [started("5"), FAILED], ["5"])
    with pytest.raises(Refused, match="failed FAILED") as error:
        sbatch.dependency_of(job(after=(After("failed", str(failed.path)),)))
    assert "--after failed:any" in str(error.value)
    assert sbatch.dependency_of(job(after=(After("failed", str(failed.path), True),))) is None


def test_an_ended_job_gets_a_new_place_in_the_queue(lab: HostBackend, slurm: FakeSlurm) -> None:
    run = slurm_run(Path(lab.node.workdir), "job-1", [started("7"), FAILED], ["7"])
    (run.control / "stop").write_text('{"by": "somebody"}')
    again = lab.restart(str(run.path), "me@here")
    assert (again["attempt"], again["slurm_id"]) == (1, "101") or again["slurm_id"] == "102"
    assert ids(str(run.path)) == ["7", again["slurm_id"]]
    assert not (run.control / "stop").exists()


def test_a_restart_whose_answer_was_lost_is_known_by_its_comment_and_can_be_killed(
        lab: HostBackend, slurm: FakeSlurm) -> None:
    run = slurm_run(Path(lab.node.workdir), "done", [started("3"), ENDED], ["3"])
    spec = JobSpec.from_json(run.spec.read_bytes())
    slurm.say("sbatch", Answer(), LOST)
    with pytest.raises(Unreachable):
        lab.restart(str(run.path), "me")
    assert lab.status([str(run.path)])["jobs"][0]["state"] == "COMPLETED"  # SLURM shows none
    (run.path.parent.parent / ".launch" / "slurm" / "queue.json").unlink()
    slurm.jobs(in_queue("9", spec))
    assert lab.status([str(run.path)])["jobs"][0]["state"] == "PENDING"
    with slurm_reacts(slurm, lambda _: slurm.jobs(in_queue("9", spec, State="CANCELLED"))):
        assert lab.kill(str(run.path), "me")["state"] == "COMPLETED"  # as before
    assert any(call[0] == "scancel" and "9" in call for call in slurm.calls())
    assert ids(str(run.path)) == ["3", "9"]


def test_a_refused_restart_leaves_the_job_as_it_was(lab: HostBackend, slurm: FakeSlurm) -> None:
    run = slurm_run(Path(lab.node.workdir), "job-1", [started("7"), FAILED], ["7"])
    before = run.spec.read_bytes()
    slurm.say("sbatch", "test-only.impossible")
    with pytest.raises(Unusable):
        lab.restart(str(run.path), "me@here", spec=job("echo", "changed"))
    assert run.spec.read_bytes() == before and ids(str(run.path)) == ["7"]


def test_a_job_that_waits_is_changed_where_it_stands(lab: HostBackend, slurm: FakeSlurm) -> None:
    run = slurm_run(Path(lab.node.workdir), "job-1", [], ["7"], started=False)
    slurm.jobs(queued("7", Name="job-1"))
    again = lab.restart(str(run.path), "me@here", spec=job("echo", "changed"), config="a: 2\n")
    assert (again["slurm_id"], slurm.count()["sbatch"]) == ("7", 0)
    assert json.loads(run.spec.read_bytes())["argv"] == ["echo", "changed"] and run.config.read_text() == "a: 2\n"


def test_a_restart_without_an_answer_of_slurm_changes_nothing(lab: HostBackend, slurm: FakeSlurm) -> None:
    run = slurm_run(Path(lab.node.workdir), "job-1", [], ["7"], started=False)
    slurm.say("squeue", "squeue.controller-down")
    slurm.say("sacct", "sacct.controller-down")
    with pytest.raises(Unreachable):
        lab.restart(str(run.path), "me@here", spec=job("echo", "changed"))
    assert json.loads(run.spec.read_bytes())["argv"] == ["true"]


def test_on_a_login_node_a_python_that_has_submitit_comes_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Python 1 is too old, 2 has no submitit, 3 has it."""
    for number, without in ("1", 1), ("2", 1), ("3", 0):
        fake = tmp_path / number
        fake.write_text(f'#!/bin/sh\n[ "$1" = -c ] && exit {without}\n[ {number} = 1 ] && exit 1\necho "$5{number}$5"\n')
        fake.chmod(0o755)
    places = [str(tmp_path / number) for number in "123"]

    def found(via: str, places: list[str]) -> str:
        monkeypatch.setattr(wire, "python_places", lambda node: places)
        return subprocess.check_output(["sh", "-c", wire.find_python(Node("lab", via), "=")], text=True).strip()

    assert (found("ssh", places), found("slurm", places), found("slurm", places[:2])) == ("=2=", "=3=", "=2=")
