"""The SLURM of the test bed does what the real thing does."""
from __future__ import annotations


from .bed import poll
from .slurmbed import GPU_NODES, SlurmBed


def test_five_idle_nodes_take_a_job_each(slurm_bed: SlurmBed) -> None:
    assert slurm_bed.node_states() == dict.fromkeys(GPU_NODES, "idle")
    assert sorted(slurm_bed.slurm("srun", "-N5", "hostname").split()) == list(GPU_NODES)


def test_gpus_of_others_are_denied(slurm_bed: SlurmBed) -> None:
    said = slurm_bed.slurm("srun", "--gres=gpu:2", "sh", "-c", "echo $SLURM_STEP_GPUS $SLURM_JOB_GPUS; cat /dev/nvidia7", check=False)
    print(said)


def test_calls_are_counted(slurm_bed: SlurmBed) -> None:
    with slurm_bed.calls() as calls:
        slurm_bed.queue("alice")
        assert calls.lines() == ["squeue -h -o %i|%u|%T|%r|%j -u alice"]
        calls.forget()
        slurm_bed.node_states()
        assert calls.count() == {"sinfo": 1}


def test_requeue(slurm_bed: SlurmBed) -> None:
    job = slurm_bed.sbatch("sleep 600")
    slurm_bed.await_job(job, "RUNNING")
    slurm_bed.slurm("scontrol", "requeue", job)
    slurm_bed.await_job(job, "PENDING")
    assert slurm_bed.await_job(job, "RUNNING")["Restarts"] == "1"
    slurm_bed.slurm("scancel", job)
    slurm_bed.await_job(job, "CANCELLED")
    assert poll(lambda: f"{job}|CANCELLED by 2001" in slurm_bed.slurm("sacct", "-nPXo", "JobID,State"))
