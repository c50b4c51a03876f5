"""The loop of phase 2: groups of samples over the ranks, until every item is on disk once.

Which samples stand in one batch is a function of the recipe alone, and a sample's random numbers of its own seed: what
is written depends neither on the ranks nor on when the work was killed. A rank takes whole groups; after each round
all ranks tell each other what they wrote and whether they were asked to stop.
"""
from __future__ import annotations

import math
import shutil
import time
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from torch import Tensor

from configs.phase2 import Phase2Run
from jobs import checkpoint
from jobs.data.multiview import read_pixels
from jobs.data.samples import Sample
from jobs.matting import rgba_of
from jobs.metrics import Metrics, Pace, duration
from jobs.mv_generator import Interrupted, ViewGenerator
from jobs.quality import judge
from jobs.runtime import Job, JobError, StopFlag, WriteFailed
from jobs.synthetic import Damaged, Item, Kept, Store, reasons, words
from jobs.world import World

_SAY_EVERY_S = 10.0
_SAVE_EVERY_S = 60.0
_JUDGED_AFTER = 20  # samples: fewer say nothing about the share that is rejected
_SPARE = 0.85  # of the GPU's free memory that a batch may take


class PoorGenerator(JobError):
    """Too many of its samples are rejected."""

    exit_code = 1


@dataclass(frozen=True)
class Work:
    """What is to be made: `items`, the real samples they name, and what of them goes into the recipe and report."""

    items: list[Item]
    samples: list[Sample]
    fingerprint: str
    skipped: list[str]
    notes: list[str]


class Synthesis:
    """One attempt of phase 2 on this rank."""

    def __init__(self, config: Phase2Run, work: Work, generator: ViewGenerator, recipe: dict[str, Any], world: World,
                 job: Job, metrics: Metrics, stop: StopFlag) -> None:
        self._config, self._work, self._generator, self._recipe = config, work, generator, recipe
        self._world, self._job, self._metrics, self._stop = world, job, metrics, stop
        self._store = Store(job.run.artifacts)
        self._pace = Pace(len(work.items))
        self._writer: checkpoint.Writer | None = None
        self._said, self._saved = -math.inf, time.monotonic()

    def run(self) -> bool:
        """To the end, or until the ranks agree to stop. Returns whether the end was reached. Raises AgreedError."""
        self._writer = checkpoint.Writer(self._job, 1, self._on_saved) if self._world.is_main else None
        groups = self._open()
        kept = self._look()
        self._metrics.write(len(kept), "resumed")
        self._metrics.say(f"{len(self._work.items)} samples to make, {len(kept)} are there")
        self._say_disk(len(self._work.items) - len(kept))
        self._generator.stop_when(lambda: self._stop.asked)
        if self._make(groups, kept) and self._finish():
            return True
        self._save(len(kept))
        self._wait()
        self._metrics.write(len(kept), "stopped")
        self._metrics.say(f"stopped at {len(kept)} of {len(self._work.items)} samples as asked; they are kept")
        self._world.barrier()
        return False

    # --- begin ------------------------------------------------------------------------------------------------------

    def _open(self) -> list[list[int]]:
        """Make or find the data set; the groups of items that are generated together."""
        batch = self._world.on_main(self._store.batch) or self._config.batch or self._free_batch()
        recipe = self._world.on_main(
            lambda: self._store.open({**self._recipe, "batch": batch}, self._job.superseded))
        self._world.all_or_none(lambda: self._store.check_seen(recipe))
        if self._config.batch not in (None, recipe["batch"]):
            self._metrics.say(f"note: batch stays {recipe['batch']}, as this data set was begun: which samples are "
                              "generated together is a part of how they are made")
        size = recipe["batch"]
        return [list(range(first, min(first + size, len(self._work.items))))
                for first in range(0, len(self._work.items), size)]

    def _free_batch(self) -> int:
        """How many objects fit into the free memory of the smallest GPU; 1 on the CPU."""
        if self._world.device.type != "cuda":
            return 1
        one, two = self._peak(1), self._peak(2)
        free = torch.cuda.mem_get_info()[0] + torch.cuda.memory_reserved()
        fits = int((_SPARE * free - one) // max(two - one, 1)) + 1
        found = min(self._world.gather(max(1, min(fits, self._config.max_batch))))
        self._metrics.say(f"batch {found}: one sample takes {(two - one) / 2**30:.2f} GiB beside "
                          f"{(2 * one - two) / 2**30:.2f} GiB, {free / 2**30:.1f} GiB are free")
        return found

    def _peak(self, objects: int) -> int:
        torch.cuda.reset_peak_memory_stats()
        size = self._generator.size
        self._generator.views(torch.ones(objects, 3, size, size), list(range(objects)), steps=1)
        return torch.cuda.max_memory_allocated()

    def _look(self, deep: bool = False) -> dict[int, Kept]:
        """The samples on disk by their items, each rank looking at a share. Damaged ones are made again; with `deep`
        they are an error, for they were written by this attempt."""
        world, found, damaged = self._world, {}, {}
        for index in range(world.rank, len(self._work.items), world.size):
            try:
                if kept := self._store.find(self._work.items[index], deep):
                    found[index] = kept
            except Damaged as error:
                damaged[index] = str(error)
        parts = world.gather((found, damaged))
        bad = dict(sorted(item for _, part in parts for item in part.items()))
        for index, what in bad.items():
            self._metrics.say(f"damaged, it is made again: {what}")
            world.on_main(lambda index=index: self._store.remove(self._work.items[index]))
        if bad and deep:
            first = next(iter(bad.values()))
            world.agree(WriteFailed(f"{len(bad)} samples are damaged on the disk, the first: {first}",
                                    "look after the disk, then `launch restart`: only they are made again"))
        return dict(sorted(item for part, _ in parts for item in part.items()))

    # --- the loop ---------------------------------------------------------------------------------------------------

    def _make(self, groups: list[list[int]], kept: dict[int, Kept]) -> bool:
        """Until every item is kept; False when the ranks agreed to stop before."""
        world = self._world
        missing = [group for group in groups if any(index not in kept for index in group)]
        if world.any(self._stop.asked):
            return False
        for first in range(0, len(missing), world.size):
            began = time.monotonic()
            mine = missing[first + world.rank] if first + world.rank < len(missing) else []
            made, error = self._group(mine, kept)
            before, asked = len(kept), False
            for part, problem, stop in world.gather((made, error, self._stop.asked)):
                kept.update(part)
                error, asked = error or problem, asked or stop
            world.agree(error)
            if len(kept) > before:
                self._pace.add(len(kept) - before, time.monotonic() - began)
                self._tell(kept, len(kept) - before, last=first + world.size >= len(missing))
            world.agree(self._problem(kept))
            if asked:
                return False
        return True

    def _group(self, indices: list[int], kept: dict[int, Kept]) -> tuple[dict[int, Kept], JobError | None]:
        """Generate one group and write what of it is missing."""
        made: dict[int, Kept] = {}
        items = [self._work.items[index] for index in indices]
        try:
            if indices:
                pictures = torch.stack([self._picture(item) for item in items])
                views = self._generator.views(pictures, [item.seed for item in items])
                for index, item, drawn in zip(indices, items, views):
                    if index not in kept:
                        made[index] = self._keep(item, drawn)
        except Interrupted:
            pass
        except JobError as error:
            return made, error
        except torch.OutOfMemoryError as error:
            return made, JobError(f"a batch of {len(items)} samples does not fit into the GPU's memory: {error}",
                                  "submit it anew with a smaller `batch`")
        except OSError as error:
            return made, WriteFailed(f"cannot write a sample below {self._store.artifacts}: {error.strerror or error}",
                                     "free some disk space, then `launch restart`: what is there is kept")
        return made, None

    def _picture(self, item: Item) -> Tensor:
        """RGB [3, S, S] in 0..1. Raises BadSample."""
        sample = self._work.samples[item.sample]
        one = replace(sample, frames=(sample.frames[item.view],))
        return read_pixels(one, self._generator.size, self._generator.background)[0, :3].float() / 255

    def _keep(self, item: Item, views: Tensor) -> Kept:
        matte, generator = self._config.matte, self._generator
        rgba = rgba_of(views.nan_to_num(1.0), generator.background, matte.low, matte.high)
        verdict = judge(views, rgba, generator.rig, self._config.quality)
        quality = {key: value for key, value in asdict(verdict).items() if key != "reasons"}
        metadata = {"source_frame": item.frame, "source": item.source, "view": item.view, "seed": item.seed,
                    **{key: self._recipe[key] for key in ("checkpoint", "weights", "rig", "steps", "guidance", "eta")},
                    "quality": quality, "rejected": [list(reason) for reason in verdict.reasons]}
        return self._store.put(item, rgba, generator.rig, metadata, not verdict.reasons)

    def _problem(self, kept: dict[int, Kept]) -> JobError | None:
        """Why it makes no sense to go on."""
        total, done = len(self._work.items), len(kept)
        counts = reasons(kept.values())
        if (done >= _JUDGED_AFTER or done == total) and counts.total() > self._config.quality.max_rejected * done:
            return PoorGenerator(
                f"{counts.total()} of {done} samples were rejected ({words(counts)}); quality.max_rejected is "
                f"{self._config.quality.max_rejected:g}",
                f"look at them in {self._store.rejected}: train the generator longer, or widen `quality:`")
        if not self._world.is_main:
            return None
        need = _bytes_each(kept) * (total - done)
        free = shutil.disk_usage(self._store.dataset).free
        if need > free:
            return WriteFailed(f"the disk of {self._store.dataset} has {_gb(free)} left, the {total - done} missing "
                               f"samples need {_gb(need)}", "free some disk space, then `launch restart`")
        return None

    # --- what is told -----------------------------------------------------------------------------------------------

    def _say_disk(self, missing: int) -> None:
        size, views = self._generator.size, len(self._generator.rig.names)
        if self._metrics.path and missing:
            free = shutil.disk_usage(self._store.dataset).free
            most = missing * views * 4 * size * size
            self._metrics.say(f"disk: at most {_gb(most)} for {missing} samples, {_gb(free)} free; time and "
                              "disk are measured on the first batch")

    def _tell(self, kept: dict[int, Kept], new: int, last: bool) -> None:
        total, done = len(self._work.items), len(kept)
        counts, pace = reasons(kept.values()), self._pace.values(done)
        self._metrics.write(done, accepted=done - counts.total(), rejected=counts.total(), samples=done, **pace)
        now = time.monotonic()
        if self._said == -math.inf:
            size, ranks = _bytes_each(kept), self._world.size
            self._metrics.say(f"measured: {ranks / pace['it_s']:.3g} s a sample on each of {ranks} ranks, {_gb(size)} "
                              f"each; the {total - done} that are left take {duration(pace['eta_s'])} and "
                              f"{_gb(size * (total - done))}")
        if last or now - self._said >= _SAY_EVERY_S:
            self._said = now
            self._metrics.say(f"sample {done}/{total}  {pace['it_s']:.3g} samples/s  eta {duration(pace['eta_s'])}  "
                              f"rejected: {words(counts)}")
        if self._writer:
            self._writer.poll()
        if now - self._saved >= _SAVE_EVERY_S:
            self._save(done)
            self._saved = now

    # --- saves and the end ------------------------------------------------------------------------------------------

    def _save(self, done: int) -> None:
        """A checkpoint that names the samples' place: they themselves are the state."""
        if self._writer:
            self._writer.start(done, {}, {"samples": done, "total": len(self._work.items),
                                          "dataset": str(self._store.dataset), "recipe": self._recipe})

    def _wait(self) -> None:
        if self._writer:
            self._writer.wait()

    def _on_saved(self, saved: checkpoint.Saved) -> None:
        self._metrics.write(saved.step, "checkpoint", save_s=round(saved.seconds, 3), path=str(saved.path))

    def _finish(self) -> bool:
        """Verify every byte, then write the lists and the manifest. False when asked to stop meanwhile."""
        kept = self._look(deep=True)
        if self._world.any(self._stop.asked):
            return False
        self._save(len(kept))
        self._wait()
        if not self._job.superseded:
            report = self._world.on_main(lambda: self._listed(list(kept.values())))
            self._metrics.say(f"done: {report['accepted']} of {report['samples']} samples accepted "
                              f"({report['train']} to train on, {report['val']} to validate on); rejected: "
                              f"{words(reasons(kept.values()))}; {self._store.dataset}")
        self._metrics.write(len(kept), "done")
        self._world.barrier()
        return True

    def _listed(self, kept: list[Kept]) -> dict[str, Any]:
        if strangers := self._store.strangers(self._work.items):
            raise JobError(f"{self._store.dataset} holds what this job did not make: {', '.join(strangers[:5])}",
                           "move it away: all that lies there is handed over")
        return self._store.finish(self._job, kept, self._config.val_share,
                                  {"bad_sources": self._work.skipped, "recipe": self._recipe})


def _bytes_each(kept: dict[int, Kept]) -> float:
    return sum(one.size for one in kept.values()) / max(1, len(kept))


def _gb(size: float) -> str:
    """`1.5 GB`, `20 MB`, `3 kB`."""
    for unit, bound in (("GB", 1e9), ("MB", 1e6)):
        if size >= bound:
            return f"{size / bound:.3g} {unit}"
    return f"{size / 1e3:.3g} kB"
