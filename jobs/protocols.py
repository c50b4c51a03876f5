"""How well faces and voices are told apart, each number beside its chance and an interval.

The interval is a bootstrap over identities (2.5 % to 97.5 %): trials with one person are no independent evidence.
Ties count as drawn lots: embeddings that are all the same score exactly chance.
"""
from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from jobs.world import mixed_seed

Array = np.ndarray
WAYS = ("voice->face", "face->voice")
GALLERIES = tuple(range(2, 11))
DEPTHS = (1, 5, 10)
_LOW, _HIGH = 2.5, 97.5  # percent
_TRIALS_AT_ONCE = 1000


@dataclass(frozen=True)
class Side:
    """One kind of media: embeddings [n, D] of length 1, and whose they are [n]."""

    embeddings: Array
    identities: Array


@dataclass(frozen=True)
class Number:
    """One measured value; `count`: of trials, probes or pairs."""

    name: str
    value: float
    low: float
    high: float
    chance: float
    count: int
    way: str = ""


@dataclass(frozen=True)
class Scores:
    """Of balanced pairs: the similarity, whether it is one person, and whose the voice is; [n] each."""

    scores: Array
    same: Array
    identities: Array


def matching(probe: Side, gallery: Side, size: int, trials: int, seed: int, groups: dict[int, str] | None = None,
             ) -> tuple[Array, Array]:
    """1:N: which of `size` others of `gallery`, all different people, is the probe's person. The credit of each trial
    (1 right, 0 wrong, 1/k in a tie of k) and the probe's identity, [trials] each; none when there are too few people.

    `groups`: everybody in a trial has the same (within gender).
    """
    random = np.random.default_rng(mixed_seed("matching", seed, size))
    heard, shown = _Media(probe.identities), _Media(gallery.identities)
    allowed = _may_meet(shown.people, groups)  # [people, people]
    enough = shown.people[allowed.sum(1) >= size - 1]
    asked = heard.people[np.isin(heard.people, enough)]
    if not len(asked):
        return np.empty(0), np.empty(0, dtype=int)
    whose = random.choice(asked, trials)
    credit = [_credit(probe, gallery, part, heard, shown, allowed, size, random)
              for part in np.split(whose, range(_TRIALS_AT_ONCE, trials, _TRIALS_AT_ONCE))]
    return np.concatenate(credit), whose


def _credit(probe: Side, gallery: Side, whose: Array, heard: _Media, shown: _Media, allowed: Array, size: int,
            random: np.random.Generator) -> Array:
    rows = np.searchsorted(shown.people, whose)
    lots = np.where(allowed[rows], random.random((len(whose), len(shown.people))), 2.0)  # who is not allowed comes last
    others = shown.people[np.argpartition(lots, size - 2, axis=1)[:, :size - 1]]
    faces = shown.drawn(np.concatenate([whose[:, None], others], 1), random)
    scores = np.einsum("td,tnd->tn", probe.embeddings[heard.drawn(whose, random)], gallery.embeddings[faces])
    best = scores == scores.max(1, keepdims=True)
    return best[:, 0] / best.sum(1)


def _may_meet(people: Array, groups: dict[int, str] | None) -> Array:
    """Bool [people, people]: never oneself, and with `groups` only those of one's own."""
    others = ~np.eye(len(people), dtype=bool)
    if groups is None:
        return others
    names = np.array([groups.get(who, "") for who in people.tolist()])
    return others & (names[:, None] == names) & (names != "")


class _Media:
    """The places of each identity's media among all."""

    def __init__(self, identities: Array) -> None:
        self._order = np.argsort(identities, kind="stable")
        self.people, self._first, self._count = np.unique(
            identities[self._order], return_index=True, return_counts=True)

    def drawn(self, whose: Array, random: np.random.Generator) -> Array:
        """One of each, by lot; shaped as `whose`."""
        rows = np.searchsorted(self.people, whose)
        return self._order[self._first[rows] + (random.random(whose.shape) * self._count[rows]).astype(int)]


def retrieval(probe: Side, gallery: Side, seed: int) -> dict[str, tuple[Array, Array]]:
    """Of each probe with a match in the gallery: R@k (one of the first k is right), MRR and AP: name -> (values [n],
    chance [n]); under "identities" whose the probes are."""
    random = np.random.default_rng(mixed_seed("retrieval", seed))
    order = random.permutation(len(gallery.identities))  # ties are broken by lot
    embeddings, identities = gallery.embeddings[order], gallery.identities[order]
    kept = np.isin(probe.identities, identities)
    whose = probe.identities[kept]
    ranks = np.argsort(-(probe.embeddings[kept] @ embeddings.T), axis=1, kind="stable")
    right = identities[ranks] == whose[:, None]  # [n, gallery], best first
    relevant, count = right.sum(1), right.shape[1]
    first = right.argmax(1) + 1
    precision = right.cumsum(1) / np.arange(1, count + 1)
    found = {f"R@{depth}": (right[:, :depth].any(1).astype(float), _chances(relevant, count, chance_of_hit(depth)))
             for depth in DEPTHS if depth < count}
    found["MRR"] = 1 / first, _chances(relevant, count, chance_of_reciprocal_rank)
    found["mAP"] = (precision * right).sum(1) / relevant, _chances(relevant, count, chance_of_precision)
    return found | {"identities": (whose, whose)}


def _chances(relevant: Array, count: int, chance: Callable[[int, int], float]) -> Array:
    known = {number: chance(number, count) for number in np.unique(relevant).tolist()}
    return np.array([known[number] for number in relevant.tolist()])


def chance_of_hit(depth: int) -> Callable[[int, int], float]:
    """Of R@depth in a random order, as a function of (relevant, gallery)."""
    def chance(relevant: int, count: int) -> float:
        missing = np.arange(min(depth, count))
        return 1 - float(np.prod(np.clip((count - relevant - missing) / (count - missing), 0, 1)))
    return chance


def chance_of_reciprocal_rank(relevant: int, count: int) -> float:
    """The mean of 1 / (place of the first of `relevant` right ones) over all orders of `count`."""
    total, none_before = 0.0, 1.0
    for place in range(1, count - relevant + 2):
        here = none_before * relevant / (count - place + 1)
        total += here / place
        none_before -= here
    return total


def chance_of_precision(relevant: int, count: int) -> float:
    """The mean average precision over all orders."""
    if count == 1:
        return 1.0
    harmonic = float((1 / np.arange(1, count + 1)).sum())
    return (harmonic + (relevant - 1) / (count - 1) * (count - harmonic)) / count


def balanced_pairs(faces: Side, voices: Side, pairs: int, seed: int) -> Scores:
    """As many pairs of one person as of two, every person equally often; at least two people."""
    random = np.random.default_rng(mixed_seed("pairs", seed))
    shown, heard = _Media(faces.identities), _Media(voices.identities)
    both = np.intersect1d(shown.people, heard.people)
    places = random.integers(0, len(both), 2 * (pairs // 2))
    same = np.arange(len(places)) % 2 == 0
    others = (places + random.integers(1, len(both), len(places))) % len(both)
    face = faces.embeddings[shown.drawn(both[np.where(same, places, others)], random)]
    voice = voices.embeddings[heard.drawn(both[places], random)]
    return Scores((face * voice).sum(1), same, both[places])


@dataclass(frozen=True)
class Roc:
    """False and true positives' rates from 0 to 1, thresholds falling; [..., points]."""

    false: Array
    true: Array


def roc(scores: Array, same: Array, weights: Array | None = None) -> Roc:
    """Pairs of one score are one point. `weights` [..., n]: how often each pair counts, as in a bootstrap."""
    order = np.argsort(-scores, kind="stable")
    scores, same = scores[order], same[order].astype(float)
    weights = np.ones(len(scores)) if weights is None else weights[..., order]
    ends = np.append(np.flatnonzero(np.diff(scores)), len(scores) - 1)
    true, false = ((weights * kind).cumsum(-1)[..., ends] for kind in (same, 1 - same))
    zero = np.zeros((*true.shape[:-1], 1))
    return Roc(*(np.concatenate([zero, rate / rate[..., -1:]], -1) for rate in (false, true)))


def auc(curve: Roc) -> Array:
    """The area under it, [...]."""
    return np.trapezoid(curve.true, curve.false, axis=-1)


def eer(curve: Roc) -> Array:
    """The rate of errors at the point of the curve where both kinds are nearest to equal, [...]."""
    missed = 1 - curve.true
    place = np.abs(missed - curve.false).argmin(-1)[..., None]
    return ((np.take_along_axis(missed, place, -1) + np.take_along_axis(curve.false, place, -1)) / 2)[..., 0]


def resampled(identities: Array, times: int, seed: int) -> Array:
    """[times, n]: how often each trial counts when the people in `identities` [n] are drawn again, with replacement."""
    people, place = np.unique(identities, return_inverse=True)
    random = np.random.default_rng(mixed_seed("bootstrap", seed))
    return random.multinomial(len(people), np.full(len(people), 1 / len(people)), times)[:, place]


def mean_of(name: str, values: Array, identities: Array, chance: float, times: int, seed: int, way: str = "") -> Number:
    """A mean over trials, with its interval."""
    people, place = np.unique(identities, return_inverse=True)
    sums, counts = np.bincount(place, values), np.bincount(place)
    random = np.random.default_rng(mixed_seed("bootstrap", seed))
    drawn = random.multinomial(len(people), np.full(len(people), 1 / len(people)), times)
    low, high = np.percentile(drawn @ sums / (drawn @ counts), (_LOW, _HIGH))
    return Number(name, float(values.mean()), float(low), float(high), chance, len(values), way)


def verification(pairs: Scores, times: int, seed: int) -> list[Number]:
    """AUC and EER."""
    weights = resampled(pairs.identities, times, seed)
    whole, drawn = (roc(pairs.scores, pairs.same, given) for given in (None, weights))
    found = []
    for name, of in (("AUC", auc), ("EER", eer)):
        low, high = np.percentile(of(drawn), (_LOW, _HIGH))
        found.append(Number(name, float(of(whole)), float(low), float(high), 0.5, len(pairs.scores)))
    return found
