"""Own metrics against torchmetrics and brute force; chance is what guessing gives; intervals are over people."""
from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torchmetrics.functional.classification import binary_auroc, binary_eer
from torchmetrics.functional.retrieval import (
    retrieval_average_precision, retrieval_hit_rate, retrieval_reciprocal_rank,
)

from configs.face_voice import Evaluation
from jobs import matching_report
from jobs.matching_report import Embedded
from jobs.protocols import (
    Side, auc, balanced_pairs, chance_of_hit, chance_of_precision, chance_of_reciprocal_rank, eer, matching, mean_of,
    retrieval, roc, verification,
)

PEOPLE, MEDIA = 30, 4


def side(noise: float, seed: int, whose: np.ndarray | None = None) -> Side:
    identities = np.repeat(np.arange(PEOPLE), MEDIA) if whose is None else whose
    centres = np.random.default_rng(0).normal(size=(PEOPLE, 16))
    embeddings = centres[identities] + noise * np.random.default_rng(seed).normal(size=(len(identities), 16))
    return Side(embeddings / np.linalg.norm(embeddings, axis=1, keepdims=True), identities)


def collapsed() -> Side:
    return Side(np.full((PEOPLE * MEDIA, 16), 0.25), np.repeat(np.arange(PEOPLE), MEDIA))


@pytest.fixture(scope="module")
def sides() -> tuple[Side, Side]:
    """Faces and voices that go together somewhat; not everybody has equally many."""
    return side(1.5, 1), side(1.5, 2, np.sort(np.random.default_rng(3).integers(0, PEOPLE, 100)))


def test_auc_and_eer_are_those_of_torchmetrics(sides: tuple[Side, Side]) -> None:
    pairs = balanced_pairs(*sides, 3000, 0)
    rounded = np.round(pairs.scores, 2)  # with ties
    scores, same = torch.tensor((rounded + 1) / 2), torch.tensor(pairs.same).long()
    curve = roc(rounded, pairs.same)
    assert auc(curve) == pytest.approx(binary_auroc(scores, same).item(), abs=1e-6)
    assert eer(curve) == pytest.approx(binary_eer(scores, same).item(), abs=1e-6)
    assert 0.6 < auc(curve) < 0.99


def test_weights_of_a_bootstrap_are_repetitions(sides: tuple[Side, Side]) -> None:
    pairs = balanced_pairs(*sides, 200, 0)
    times = np.random.default_rng(0).integers(0, 4, 200)
    again = roc(np.repeat(pairs.scores, times), np.repeat(pairs.same, times))
    weighted = roc(pairs.scores, pairs.same, times[None])
    assert auc(weighted)[0] == pytest.approx(auc(again))
    assert eer(weighted)[0] == pytest.approx(eer(again))


def test_retrieval_is_that_of_torchmetrics(sides: tuple[Side, Side]) -> None:
    faces, voices = sides
    found = retrieval(voices, faces, 0)
    similar = torch.tensor(1 + voices.embeddings @ faces.embeddings.T)  # torchmetrics leaves out what is below 0
    right = torch.tensor(voices.identities[:, None] == faces.identities)
    for name, of in (("MRR", retrieval_reciprocal_rank), ("mAP", retrieval_average_precision),
                     *((f"R@{k}", lambda s, r, k=k: retrieval_hit_rate(s, r, top_k=k)) for k in (1, 5, 10))):
        expected = [of(scores, hits).item() for scores, hits in zip(similar, right)]
        np.testing.assert_allclose(found[name][0], expected, atol=1e-6, err_msg=name)


def test_matching_is_what_counting_all_cases_gives(sides: tuple[Side, Side]) -> None:
    """1:2 over many trials against the mean over people of every possible trial."""
    faces, voices = sides
    credit, whose = matching(voices, faces, 2, 60_000, 0)
    scores = voices.embeddings @ faces.embeddings.T
    expected = []
    for who in np.unique(voices.identities):
        rows = scores[voices.identities == who]
        right, wrong = rows[:, faces.identities == who], rows[:, faces.identities != who]
        expected.append((right[:, :, None] > wrong[:, None]).mean())
    assert credit.mean() == pytest.approx(np.mean(expected), abs=0.01)
    assert set(whose.tolist()) == set(voices.identities.tolist())


def test_within_gender_nobody_of_another_is_offered() -> None:
    """Embeddings that say the gender and nothing else: easy among all, at chance within gender."""
    whose = np.repeat(np.arange(20), 3)
    embeddings = np.eye(16)[whose % 2]
    both = Side(embeddings, whose)
    genders = {who: "fm"[who % 2] for who in range(20)}
    among_all, _ = matching(both, both, 2, 4000, 0)
    within, _ = matching(both, both, 2, 4000, 0, genders)
    assert among_all.mean() == pytest.approx(0.5 + 0.5 * 10 / 19, abs=0.02)
    assert (within == 0.5).all()


@pytest.mark.parametrize(("relevant", "count"), [(1, 12), (3, 12), (12, 12)])
def test_chances_are_those_of_random_orders(relevant: int, count: int) -> None:
    random = np.random.default_rng(0)
    right = np.argsort(random.random((40_000, count)), 1) < relevant
    places = np.arange(1, count + 1)
    precision = ((right.cumsum(1) / places) * right).sum(1) / relevant
    assert chance_of_precision(relevant, count) == pytest.approx(precision.mean(), abs=0.01)
    assert chance_of_reciprocal_rank(relevant, count) == pytest.approx((1 / (right.argmax(1) + 1)).mean(), abs=0.01)
    assert chance_of_hit(5)(relevant, count) == pytest.approx(right[:, :5].any(1).mean(), abs=0.01)


def test_embeddings_that_are_all_the_same_score_chance_and_no_more() -> None:
    same = collapsed()
    how = Evaluation(trials=2000, bootstrap=50)
    for number in matching_report.evaluated("x", Embedded(same, same, {}), how).numbers:
        assert number.value == pytest.approx(number.chance, abs=0.04), number


def test_an_interval_is_over_people_not_over_trials(sides: tuple[Side, Side]) -> None:
    """A thousand trials with each of four people are the evidence of four people."""
    whose = np.repeat(np.arange(4), 1000)
    values = (whose < 2).astype(float)
    number = mean_of("x", values, whose, 0.5, 500, 0)
    assert number.value == 0.5 and number.high - number.low > 0.5
    found = verification(balanced_pairs(*sides, 4000, 0), 200, 0)
    assert all(one.low < one.value < one.high and one.high - one.low > 0.02 for one in found)


def test_the_report_has_a_chance_beside_every_number(sides: tuple[Side, Side], tmp_path: Path) -> None:
    faces, voices = sides
    genders = {who: "fm"[who % 2] for who in range(PEOPLE)}
    group = matching_report.evaluated("strangers", Embedded(faces, voices, genders),
                                      Evaluation(trials=500, bootstrap=20))
    matching_report.write(tmp_path, [group])
    written = json.loads((tmp_path / "evaluation.json").read_text())[0]
    names = {(one["name"], one["way"]) for one in written["numbers"]}
    ways = ("voice->face", "face->voice")
    assert {(f"1:{size}", way) for size in range(2, 11) for way in ways} < names
    assert {(name, way) for name in ("R@1", "R@5", "R@10", "MRR", "mAP", "1:2 within gender") for way in ways} < names
    assert {("AUC", ""), ("EER", "")} < names
    assert all(0 < one["chance"] <= 0.5 and one["low"] <= one["value"] <= one["high"] for one in written["numbers"]
               if not one["name"].startswith("R@"))
    rows = [line for line in (tmp_path / "evaluation.txt").read_text().splitlines() if ".." in line]
    assert len(rows) == len(names)
    for plot in matching_report.PLOTS:
        with Image.open(tmp_path / plot) as picture:
            assert picture.size == (640, 480)
