"""Claims about the agreement models: rates, correlation, calibration, and luck that belongs to the request."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from pydantic import ValidationError

from engine.workload.agreement import DrafterAgreement, IidAgreement, MarkovAgreement
from engine.workload.markov import DRAFTERS

MODELS = [IidAgreement(alpha=0.6), DrafterAgreement(), DrafterAgreement(drafter="medusa", mean_agreement=0.5)]


def draw(model, requests=2000, tokens=200, seed=0):
    return model.draw(seed, np.arange(requests), np.full(requests, tokens, dtype=np.int32))


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_positions_agree_as_often_as_the_model_says(model):
    # 400,000 positions, correlated over some 75: a standard error below .003.
    agreed = (draw(model).rank == 0).reshape(2000, 200)[:, 50:]
    assert agreed.mean() == pytest.approx(model.chain.mean_agreement, abs=0.01)


def test_iid_positions_are_independent():
    agreed = draw(IidAgreement(alpha=0.6)).rank == 0
    assert np.corrcoef(agreed[1:], agreed[:-1])[0, 1] == pytest.approx(0.0, abs=5 / np.sqrt(agreed.size))


@pytest.mark.parametrize("alpha", [0.0, 1.0])
def test_a_drafter_may_be_always_or_never_right(alpha):
    drawn = draw(IidAgreement(alpha=alpha), requests=3)
    assert ((drawn.rank == 0) == (alpha == 1.0)).all()
    assert np.isfinite(drawn.confidence).all()


def test_acceptance_rises_along_a_draft_of_the_68m_drafter():
    run = draw(DrafterAgreement(), requests=4000).run_length.reshape(4000, 200)[:, 1:180]
    # Steps that begin after a disagreement, each draft as long as it goes: the log's .85 late in a draft also owes to a
    # rule that drafts long only where it went well.
    starts = run[:, 1:][run[:, :-1] == 0]
    accepted = [(starts[starts >= d] > d).mean() for d in range(8)]
    assert (np.diff(accepted[:7]) > 0).all()
    assert 0.53 < accepted[0] < 0.6
    assert accepted[6] > 0.68


@pytest.mark.parametrize("model", MODELS, ids=str)
def test_confidence_is_calibrated_and_informative_but_imperfect(model):
    drawn = draw(model, requests=4000)
    agreed = drawn.rank == 0
    for low in np.arange(0.0, 1.0, 0.1):
        inside = (drawn.confidence >= low) & (drawn.confidence < low + 0.1)
        if inside.sum() > 2000:
            assert agreed[inside].mean() == pytest.approx(drawn.confidence[inside].mean(), abs=0.02)
    picks = np.random.default_rng(0)
    right, wrong = (picks.choice(drawn.confidence[which], 20_000) for which in (agreed, ~agreed))
    assert 0.7 < (right > wrong).mean() < 0.95


def test_a_temperature_below_one_makes_the_drafter_over_confident():
    drawn = draw(IidAgreement(alpha=0.6, confidence_temperature=0.5))
    sure = drawn.confidence > 0.9
    assert (drawn.rank[sure] == 0).mean() < drawn.confidence[sure].mean() - 0.05


def test_ranks_of_misses_fall_off_as_the_power_law():
    rank = draw(IidAgreement(alpha=0.0)).rank
    assert (rank <= 3).mean() == pytest.approx(0.515, abs=0.01)
    assert (rank == 1).mean() / (rank == 2).mean() == pytest.approx(2**1.4, rel=0.03)


@settings(max_examples=25, deadline=None)
@given(st.integers(0, 2**63 - 1), st.lists(st.integers(1, 1000), min_size=2, max_size=8, unique=True))
def test_luck_depends_on_seed_and_request_alone(seed, numbers):
    model = DrafterAgreement()
    together = model.draw(seed, np.array(numbers), np.full(len(numbers), 40, dtype=np.int32))
    alone = model.draw(seed, np.array(numbers[1:2]), np.array([25], dtype=np.int32))
    assert together.rank[40:65].tolist() == alone.rank.tolist()
    assert together.confidence[40:65].tolist() == alone.confidence.tolist()


def test_requests_and_seeds_differ_in_their_luck():
    first, second = draw(DrafterAgreement(), 2, 400).rank.reshape(2, 400)
    assert (first != second).any()
    assert (first != draw(DrafterAgreement(), 1, 400, seed=1).rank).any()


@settings(max_examples=15, deadline=None)
@given(st.sampled_from(sorted(DRAFTERS)), st.floats(0.3, 0.9))
def test_the_mean_knob_reaches_its_target(drafter, mean):
    assert DrafterAgreement(drafter=drafter, mean_agreement=mean).chain.mean_agreement == pytest.approx(mean, abs=1e-3)


@pytest.mark.parametrize(
    ("settings_", "key"),
    [({"alpha": 1.2}, "alpha"), ({"alpha": 0.5, "beta": 1}, "beta"), ({"alpha": "often"}, "alpha"), ({}, "alpha")],
)
def test_a_wrong_setting_is_refused_by_name(settings_, key):
    with pytest.raises(ValidationError, match=key):
        IidAgreement(**settings_)


def test_a_model_without_spread_or_passages_is_iid():
    assert draw(MarkovAgreement(base_mean=0.6)).rank.tolist() == draw(IidAgreement(alpha=0.6)).rank.tolist()
