"""The one training loop of all stages.

A *step* is one attempted forward-backward pass of all ranks; `accumulation` of them make an update, which is
applied, or skipped and counted when it is not finite or exploded. Nothing the loop does depends on what a
process remembers: random choices are functions of (seed, step, rank), the learning rate of the applied
updates, the order of summation of the parameters (jobs.exchange). So a run that was stopped or killed and
resumed goes on bit for bit, on the CPU, with the same ranks and threads.

All ranks stop at the same step: a rank that got SIGTERM says so in the next update's collective, and every
rank leaves after that update, which is then saved.
"""
from __future__ import annotations

import json
import math
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch

from cluster.contract import merged_metrics, write_atomically
from jobs import checkpoint
from jobs.exchange import Exchange, Totals
from jobs.guards import GradientWatch, WeightWatch
from jobs.loader import Order, Waits, batches
from jobs.metrics import Metrics, Pace, duration
from jobs.optimizer import make_optimizer, set_lr
from jobs.runtime import AgreedError, Job, JobError, NonFinite, StopFlag
from jobs.schedule import Plan
from jobs.stage import Stage
from jobs.world import World, mixed_seed

REPORT = "report.json"  # in artifacts/: the run went to its end
_SAY_EVERY_S = 2.0
_RATIO_AFTER = 50  # updates, before the share of skipped ones is judged


@dataclass
class Progress:
    """Where a run is; stored in the checkpoint."""

    step: int = 0  # attempted passes
    applied: int = 0  # updates
    skipped: int = 0  # updates
    skipped_in_a_row: int = 0
    evaluated: int = -1  # the step of the last evaluation; it and what follows count when validation decides
    best: float | None = None  # of best_metric
    stale: int = 0  # evaluations since that
    drops: int = 0  # of the learning rate, on a plateau


class Trainer:
    """Trains `stage` by `plan`; `run()` once."""

    def __init__(self, stage: Stage, plan: Plan, world: World, job: Job, metrics: Metrics,
                 stop: StopFlag) -> None:
        self.stage, self.plan, self.world, self.job, self.metrics = stage, plan, world, job, metrics
        self.progress = Progress()
        self._stop = stop
        self._order = Order(len(stage.source), plan.batch_per_rank, world, plan.seed)
        self._named = {f"{module}.{name}": parameter for module, owner in stage.modules.items()
                       for name, parameter in owner.named_parameters() if parameter.requires_grad}
        self._optimizer = world.all_or_none(lambda: make_optimizer(stage, self._named, plan))
        self._watch = (GradientWatch(self._named, self._frozen(), partial(self._tell, "gradients"))
                       if stage.watches_gradients else None)
        self._weight_watch = WeightWatch(self._named, plan.lr, partial(self._tell, "weights"))
        self._exchange = Exchange(list(self._named.values()), plan.accumulation, 1 + len(stage.scalars),
                                  world)
        self._writer = (checkpoint.Writer(job, plan.keep_last, self._on_saved, stage.attachments)
                        if world.is_main else None)
        self._waits = Waits(world.device, plan.accumulation)
        self._pace = Pace(plan.total)
        self._said = -math.inf
        self._saved_step = -1
        self._evaluation: dict[str, float] = {}
        self._ended: str | None = None  # why validation ended the run before its last step

    def run(self) -> bool:
        """Train to the end, or to the agreed stop. Returns whether the end was reached.

        Raises AgreedError (a checkpoint that does not fit, bad samples, too many skipped updates in a row)
        and WriteFailed.
        """
        resumed = self._begin()
        if not self._agreed_stop() and self._evaluate_first(resumed) and self._train() and self._finish():
            return True
        self._end_early()
        return False

    # --- begin and end
    # ------------------------------------------------------------------------------------------------

    def _begin(self) -> bool:
        """Load the checkpoint, or spread rank 0's fresh weights. Returns whether it was a checkpoint."""
        if self.job.resume is None:
            for tensor in (tensor for named in self._weights().values() for tensor in named.values()):
                self.world.from_main(tensor)
        else:
            self._resume(self.job.resume)
        self.metrics.write(self.progress.step, "resumed", applied=self.progress.applied)
        return self.job.resume is not None

    def _resume(self, path: Path) -> None:
        state = self.world.on_main(lambda: self._read_state(path))
        checkpoint.load_tensors(path, self._tensors(), self.world, self.job.attempt.config)
        self.progress = Progress(**state["progress"])
        self.metrics.say(f"resumed from {path} at step {self.progress.step}")
        here = self._surroundings()
        changed = [f"{key} {state['surroundings'].get(key)} -> {value}" for key, value in here.items()
                   if state["surroundings"].get(key) != value]
        if changed:
            self.metrics.say(f"note: not bit-exact with the run before: {', '.join(changed)}")

    def _read_state(self, path: Path) -> dict[str, Any]:
        state = checkpoint.read_state(path)
        checkpoint.check_identity(path, state, self.stage.identity)
        step = state["progress"]["step"]
        if step >= self.plan.total and not self._only_end_is_missing(path, step):
            raise JobError(f"{path} is at step {step} already and the run ends at step {self.plan.total}: "
                           "there is nothing left to train",
                           "raise training.max_steps, or start without --resume")
        return state

    def _only_end_is_missing(self, path: Path, step: int) -> bool:
        """Whether this very run trained to its end and was killed during the last evaluation or the
        artifacts."""
        if path.parent.resolve() != self.job.checkpoints.resolve() or step != self.plan.total:
            return False
        try:
            return json.loads((self.job.run.artifacts / REPORT).read_bytes())["step"] < step
        except FileNotFoundError:
            return True

    def _evaluate_first(self, resumed: bool) -> bool:
        """Before the first step; after a resume only what the killed attempt had still to ask its validation."""
        plan, progress = self.plan, self.progress
        if not resumed:
            return self._evaluate()
        if progress.step == plan.total or not plan.due(plan.evaluate_every, progress.evaluated, progress.step):
            return True
        if not plan.decided_by_validation and self.world.on_main(self._was_evaluated):
            return True  # after the checkpoint was begun; only a decision needs what it found
        self._save()  # so that the best one is a checkpoint of this attempt
        return self._evaluate()

    def _was_evaluated(self) -> bool:
        """Whether an earlier attempt has evaluated this step."""
        return any(line["step"] == self.progress.step and line.get("event") == "eval"
                   for line in merged_metrics(self.job.run))

    def _finish(self) -> bool:
        """The last checkpoint, evaluation, artifacts and report. False when asked to stop before they were
        complete."""
        self._save()
        if self._ended:
            self.metrics.say(f"ended at step {self.progress.step} of {self.plan.total}: {self._ended}")
        elif not self._evaluate():
            return False
        if self._writer:
            ours = not self.job.superseded
            if ours:
                self.job.run.artifacts.mkdir(parents=True, exist_ok=True)
                self.stage.artifacts(self.job.run.artifacts)
            self._writer.wait()
            if ours:
                self._report()
        self.metrics.write(self.progress.step, "done", **self._peak())
        self.world.barrier()
        return True

    def _peak(self) -> dict[str, float]:
        """What this rank's GPU had to give at the most, for estimates of other runs; nothing on the CPU."""
        if self.world.device.type != "cuda":
            return {}
        return {"gpu_peak_mb": round(torch.cuda.max_memory_reserved(self.world.device) / 2**20, 1)}

    def _report(self) -> None:
        progress, plan = self.progress, self.plan
        lr = plan.lr_of(max(0, progress.applied - 1), progress.drops)
        report = {**asdict(progress), "total": plan.total, "updates": plan.updates, "lr_end": lr, "ended": self._ended,
                  "identity": self.stage.identity, "provenance": self.stage.provenance,
                  "metrics": self._evaluation}
        write_atomically(self.job.run.artifacts / REPORT, json.dumps(report, indent=1).encode())
        self.metrics.say(f"done: {plan.total} steps, {progress.applied} of {plan.updates} updates applied, "
                         f"lr ended at {lr:.3g}; artifacts in {self.job.run.artifacts}")

    def _end_early(self) -> None:
        self._save()
        if self._writer:
            self._writer.wait()
        self.metrics.write(self.progress.step, "stopped", **self._peak())
        self.metrics.say(f"stopped at step {self.progress.step} of {self.plan.total} as asked; "
                         "a checkpoint is saved")
        self.world.barrier()

    # --- steps
    # --------------------------------------------------------------------------------------------------------

    def _train(self) -> bool:
        """Until the last step; False when the ranks agreed to stop before it."""
        plan, stop = self.plan, False
        source = batches(self.stage.source, self._order, self.progress.step, plan.total, plan.loader_workers,
                         pin=self.world.device.type == "cuda")
        while self.progress.step < plan.total and not stop and not self._ended:
            before = self.progress.step
            stop = self._update(source)
            now = self.progress.step
            if self._writer:
                self._writer.poll()
            if now == plan.total:
                return True
            evaluate = plan.due(plan.evaluate_every, before, now)
            if not stop and (plan.due(plan.checkpoint_every, before, now) or evaluate and plan.decided_by_validation):
                self._save()
            if not stop and evaluate:
                stop = not self._evaluate()
        return not stop

    def _update(self, source: Iterator[Any]) -> bool:
        """The passes of one update. Returns whether the ranks agreed to stop."""
        began = time.monotonic()
        first = self.progress.step
        passes = min(self.plan.accumulation, self.plan.total - first)
        self._exchange.clear()
        names: list[str] = []
        error: JobError | None = None
        for row in range(passes):
            batch = self._waits.next(source)
            error = batch if isinstance(batch, JobError) else None
            if self.stage.gathers:
                self.world.agree(error)  # else the others would wait in this pass for the one that has no batch
            if error:
                break
            names += self.stage.names(batch)
            self._exchange.put(row, self._pass(batch, first + row))
            self._waits.passed()
        totals = self._exchange.total(self._stop.asked, error is not None, passes)
        if totals.failed:
            self.world.agree(error)
        self.progress.step += passes
        whole = passes == self.plan.accumulation or self.plan.partial_update
        problem = self._apply(totals, passes) if whole else None
        self._pace.add(passes, time.monotonic() - began, self._waits.taken())
        self._log(first, passes, totals)
        if problem:
            self._log_skip(problem, names)
        return totals.stop

    def _pass(self, batch: Any, step: int) -> list[torch.Tensor]:
        torch.manual_seed(mixed_seed("pass", self.plan.seed, step, self.world.rank))
        with torch.autocast(self.world.device.type, torch.bfloat16, enabled=self.plan.precision == "bf16"):
            loss, scalars = self.stage.loss(batch, step)
        loss.backward()
        return [loss, *(scalars[name] for name in self.stage.scalars)]

    def _apply(self, totals: Totals, passes: int) -> str | None:
        """Take the step of the optimizer, or say why not."""
        plan, progress = self.plan, self.progress
        limit = plan.grad_clip * plan.allowed_gradnorm_factor
        losses = [row[0] for row in totals.rows[:passes]]
        if not math.isfinite(totals.norm) or not all(map(math.isfinite, losses)):
            problem = f"loss {losses[-1]} and gradient norm {totals.norm} are not both finite"
        elif totals.norm > limit:
            problem = f"gradient norm {totals.norm:.3g} > {limit:.3g} (grad_clip x allowed_gradnorm_factor)"
        else:
            self._exchange.clip(totals.norm, plan.grad_clip)
            lr = plan.lr_of(progress.applied, progress.drops)
            set_lr(self._optimizer, lr)
            self._optimizer.step()
            progress.applied += 1
            progress.skipped_in_a_row = 0
            self._see_gradients()
            if self.world.is_main:
                self._weight_watch.see(lr)
            self.stage.after_update(progress.applied)
            return None
        progress.skipped += 1
        progress.skipped_in_a_row += 1
        return problem

    def _see_gradients(self) -> None:
        try:
            if self._watch:
                self._watch.see()
        except JobError as error:  # the gradients are the same on every rank, and so is the verdict
            raise AgreedError(error) from None

    def _tell(self, event: str, **values: float | int | str) -> None:
        self.metrics.write(self.progress.step, event, **values)

    def _log_skip(self, problem: str, names: list[str]) -> None:
        """Name the samples; end the run when it is stuck."""
        progress = self.progress
        gathered = self.world.gather((self.stage.offenders(), names))
        guilty = [name for offenders, _ in gathered for name in offenders]
        everyone = ", ".join(guilty or [name for _, part in gathered for name in part])
        self.metrics.write(progress.step, "skipped", reason=problem, samples_named=everyone)
        self.metrics.say(f"step {progress.step}: update skipped ({progress.skipped_in_a_row} in a row): "
                         f"{problem}; samples {everyone}")
        if progress.skipped_in_a_row >= self.plan.max_consecutive_skips:
            self.world.agree(NonFinite(
                f"{progress.skipped_in_a_row} updates in a row were skipped, the last at step "
                f"{progress.step}: {problem}; samples {everyone}",
                "the weights are those of the last applied update; look at the samples, lower "
                "training.optimizer.lr, or start from an earlier checkpoint"))
        tried = progress.applied + progress.skipped
        if tried >= _RATIO_AFTER and progress.skipped > self.plan.max_skip_ratio * tried:
            self.world.agree(NonFinite(
                f"{progress.skipped} of {tried} updates were skipped, more than "
                f"{self.plan.max_skip_ratio:.0%}, the last at step {progress.step}: {problem}; samples {everyone}",
                "look at the samples named in the log, or lower training.optimizer.lr"))

    def _log(self, first: int, passes: int, totals: Totals) -> None:
        plan, progress = self.plan, self.progress
        last = first + passes
        for row, step in enumerate(range(first + 1, last + 1)):
            if step % plan.log_every and step != plan.total:
                continue
            means = dict(zip(("loss", *self.stage.scalars), totals.rows[row]))
            line = self.stage.summary(means) | {
                "lr": plan.lr_of(max(0, progress.applied - 1), progress.drops), "applied": progress.applied,
                "epoch": self._order.epoch(step), "samples": step * self.world.size * plan.batch_per_rank}
            if step == last:
                line |= {"grad_norm": totals.norm, **self._pace.values(step)}
            self.metrics.write(step, **line)
            self._say(step, line)

    def _say(self, step: int, line: dict[str, float]) -> None:
        now = time.monotonic()
        if "it_s" not in line or now - self._said < _SAY_EVERY_S and step not in (1, self.plan.total):
            return
        self._said = now
        shown = "  ".join(f"{name} {line[name]:.4g}" for name in self.stage.shown if name in line)
        self.metrics.say(f"step {step}/{self.plan.total}  {shown}  lr {line['lr']:.2e}  "
                         f"{line['it_s']:.3g} it/s  eta {duration(line['eta_s'])}")

    # --- evaluation, checkpoints
    # ----------------------------------------------------------------------------------------

    def _evaluate(self) -> bool:
        """False when the ranks agreed to stop meanwhile."""
        step = self.progress.step
        torch.manual_seed(mixed_seed("evaluate", self.plan.seed, step))
        for module in self.stage.modules.values():
            module.eval()
        began = time.monotonic()
        with torch.no_grad():
            found = self.stage.evaluate(step, self._agreed_stop)
        for module in self.stage.modules.values():
            module.train()
        if found is None:
            return False
        self._evaluation = found
        self.metrics.write(step, "eval", applied=self.progress.applied, **found)
        self.metrics.say(f"evaluation at step {step} ({duration(time.monotonic() - began)}): "
                         + "  ".join(f"{name} {value:.4g}" for name, value in found.items()))
        best = found.get(self.stage.best_metric or "", math.nan)
        self._decide(step, found, best)
        if self._writer and step == self._saved_step and math.isfinite(best):
            self._writer.mark_best(step, str(self.stage.best_metric), best)
        return True

    def _decide(self, step: int, found: dict[str, float], value: float) -> None:
        """Count the evaluations without a better value: the rate falls, or the run is done."""
        plan, progress = self.plan, self.progress
        progress.evaluated = step
        if not plan.decided_by_validation:
            return
        if math.isfinite(value) and (progress.best is None or value > progress.best):
            progress.best, progress.stale = value, 0
        else:
            progress.stale += 1
            progress.drops += plan.lr_decay == "plateau" and progress.stale % plan.plateau_patience == 0
        if plan.patience is not None and step < plan.total:
            self._ended = self.stage.finished(found)
            if self._ended is None and progress.stale >= plan.patience:
                self._ended = f"{self.stage.best_metric} was no better in {progress.stale} evaluations"

    def _save(self) -> None:
        if self._saved_step == self.progress.step:
            return
        self._saved_step = self.progress.step
        if self._writer:
            state = {"progress": asdict(self.progress), "surroundings": self._surroundings(),
                     "identity": self.stage.identity, "provenance": self.stage.provenance,
                     "plan": asdict(self.plan)}
            self._writer.start(self.progress.step, self._tensors(), state)

    def _on_saved(self, saved: checkpoint.Saved) -> None:
        self.metrics.write(saved.step, "checkpoint", save_s=round(saved.seconds, 3), path=str(saved.path))
        self.metrics.say(f"checkpoint {saved.path.name} ({saved.seconds:.2g} s)")

    def _tensors(self) -> dict[str, dict[str, torch.Tensor]]:
        """All that a checkpoint holds, live: {"model": …, "optimizer": …} and the files of the stage's own."""
        moments = {f"{name}.{key}": value for name, parameter in self._named.items()
                   for key, value in self._optimizer.state[parameter].items()}
        return {**self._weights(), "optimizer": moments}

    def _weights(self) -> dict[str, dict[str, torch.Tensor]]:
        return checkpoint.weights_of(self.stage.modules, self.stage.files)

    def _surroundings(self) -> dict[str, Any]:
        """What a resume must share to be bit-exact."""
        plan = self.plan
        return {"ranks": self.world.size, "threads": torch.get_num_threads(),
                "device": self.world.device.type, "batch per rank": plan.batch_per_rank,
                "accumulation": plan.accumulation, "seed": plan.seed,
                "precision": plan.precision, "torch": torch.__version__, **self.stage.provenance}

    def _frozen(self) -> dict[str, torch.nn.Parameter]:
        """Everything that must get no gradient: whatever the stage's networks have besides what is trained."""
        trained = {id(parameter) for parameter in self._named.values()}
        return {f"{module}.{name}": parameter
                for module, owner in {**self.stage.frozen, **self.stage.modules}.items()
                for name, parameter in owner.named_parameters() if id(parameter) not in trained}

    def _agreed_stop(self) -> bool:
        return self.world.any(self._stop.asked)
