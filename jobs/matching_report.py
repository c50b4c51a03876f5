"""The evaluation of face-voice matching as a table, as JSON and as three plots."""
from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from configs.face_voice import Evaluation
from jobs.plots import COLOURS, Line, Plot, histogram
from jobs.protocols import (
    GALLERIES, WAYS, Number, Roc, Scores, Side, balanced_pairs, matching, mean_of, retrieval, roc,
    verification,
)

TABLE, NUMBERS = "evaluation.txt", "evaluation.json"
PLOTS = ("roc.png", "n_way.png", "similarities.png")
UNSEEN, SEEN = "unseen-unheard", "seen-heard"
_GREY = (120, 120, 120)
# VoxCeleb1, 1:2 voice->face on unseen identities, in percent: where a result on real data would stand
_LITERATURE = "SVHF 81, DIMNet 84, FOP 83.5, PINs 84, SSNet 78 (VoxCeleb1, 1:2 voice->face); AUC 88.2 (Vclip)"


@dataclass(frozen=True)
class Embedded:
    """Faces and voices of some people in one space; `genders` by identity, for those where it is known."""

    faces: Side
    voices: Side
    genders: dict[int, str]

    def sides(self, way: str) -> tuple[Side, Side]:
        """Probe and gallery."""
        return (self.voices, self.faces) if way == WAYS[0] else (self.faces, self.voices)


@dataclass(frozen=True)
class Group:
    """All numbers of one group of people, and what the plots need."""

    name: str
    people: int
    numbers: list[Number]
    curve: Roc
    pairs: Scores

    def number(self, name: str, way: str = "") -> Number:
        return next(one for one in self.numbers if (one.name, one.way) == (name, way))


def evaluated(name: str, media: Embedded, how: Evaluation) -> Group:
    """Every protocol on one group; those that need more people than there are, are left out."""
    numbers = [number for way in WAYS for number in _matched(media, way, how)]
    for way in WAYS:
        found = retrieval(*media.sides(way), how.seed)
        whose, _ = found.pop("identities")
        numbers += [mean_of(name, values, whose, float(chance.mean()), how.bootstrap, how.seed, way)
                    for name, (values, chance) in found.items()]
    pairs = balanced_pairs(media.faces, media.voices, how.trials, how.seed)
    numbers += verification(pairs, how.bootstrap, how.seed)
    return Group(name, len(np.unique(media.voices.identities)), numbers, roc(pairs.scores, pairs.same), pairs)


def _matched(media: Embedded, way: str, how: Evaluation) -> list[Number]:
    probe, gallery = media.sides(way)
    found = []
    for size, groups, name in [(2, None, "1:2"), (2, media.genders, "1:2 within gender"),
                               *((size, None, f"1:{size}") for size in GALLERIES[1:])]:
        if groups is not None and not groups:
            continue
        credit, whose = matching(probe, gallery, size, how.trials, how.seed, groups)
        if len(credit):
            found.append(mean_of(name, credit, whose, 1 / size, how.bootstrap, how.seed, way))
    return found


def table(groups: Sequence[Group]) -> str:
    """For people."""
    lines = []
    for group in groups:
        lines += [f"{group.name}: {group.people} identities",
                  f"  {'':34}{'value':>8}{'chance':>9}   {'95 % interval':17}trials"]
        for one in group.numbers:
            words = f"{one.name} {one.way}".strip()
            interval = f"{one.low:.3f} .. {one.high:.3f}"
            lines.append(f"  {words:34}{one.value:8.3f}{one.chance:9.3f}   {interval:17}{one.count}")
        lines.append("")
    return "\n".join([*lines, f"elsewhere: {_LITERATURE}", ""])


def write(directory: Path, groups: Sequence[Group]) -> None:
    directory.mkdir(parents=True, exist_ok=True)
    (directory / TABLE).write_text(table(groups))
    content = [{"group": group.name, "identities": group.people, "numbers": [asdict(one) for one in group.numbers]}
               for group in groups]
    (directory / NUMBERS).write_text(json.dumps(content, indent=1))
    for plot, name in zip((_roc_plot(groups), _n_way_plot(groups), _similarity_plot(groups[0])), PLOTS):
        plot.save(directory / name)


def _roc_plot(groups: Sequence[Group]) -> Plot:
    lines = [Line(f"{group.name}, AUC {group.number('AUC').value:.3f}", group.curve.false.tolist(),
                  group.curve.true.tolist(), colour) for group, colour in zip(groups, COLOURS)]
    return Plot("Is it one person?", "false positives", "true positives", (0, 1), (0, 1),
                [*lines, Line("chance", [0, 1], [0, 1], _GREY, dashed=True)])


def _n_way_plot(groups: Sequence[Group]) -> Plot:
    lines = []
    for group in groups:
        for way in WAYS:
            shown = [(size, one.value) for size in GALLERIES for one in group.numbers
                     if (one.name, one.way) == (f"1:{size}", way)]
            if shown:
                lines.append(Line(f"{group.name}, {way}", *zip(*shown), COLOURS[len(lines) % len(COLOURS)]))
    chance = Line("chance", GALLERIES, [1 / size for size in GALLERIES], _GREY, dashed=True)
    return Plot("1:N matching", "N", "right", (GALLERIES[0], GALLERIES[-1]), (0, 1), [*lines, chance],
                ticks=len(GALLERIES) - 1, legend_on_top=True)


def _similarity_plot(group: Group) -> Plot:
    edges = np.linspace(-1, 1, 41).tolist()
    lines = [histogram(name, group.pairs.scores[group.pairs.same == same].tolist(), edges, colour)
             for name, same, colour in (("one person", True, COLOURS[0]), ("two people", False, COLOURS[1]))]
    top = max(max(line.y) for line in lines)
    return Plot(f"Similarities, {group.name}", "cosine", "share", (-1, 1), (0, top * 1.1), lines,
                ticks=4, legend_on_top=True)


def quick(media: Embedded, trials: int, seed: int) -> tuple[dict[str, float], Number]:
    """What a validation while training says, and 1:2 matching both ways with its interval."""
    credits = [matching(*media.sides(way), 2, trials, seed) for way in WAYS]
    both = mean_of("1:2", *map(np.concatenate, zip(*credits)), 0.5, 200, seed)
    auc, eer = verification(balanced_pairs(media.faces, media.voices, 2 * trials, seed), 20, seed)
    found = retrieval(media.voices, media.faces, seed)
    hits = {f"val/r{name[2:]}{end}": float(values.mean()) for name, pair in found.items() if name.startswith("R@")
            for end, values in zip(("", "_chance"), pair)}
    return {"val/match": both.value, "val/match_chance": 0.5, "val/v2f": float(credits[0][0].mean()),
            "val/f2v": float(credits[1][0].mean()), "val/auc": auc.value, "val/eer": eer.value, **hits}, both

