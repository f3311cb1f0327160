"""Sampling settings mean what they mean in `transformers`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from engine.speculation.sampling import LEAST_TEMPERATURE, Sampling, SamplingError, draw, finite_rows, most_probable


@pytest.mark.parametrize("temperature", [0.3, 1.0, 2.5])
@pytest.mark.parametrize("top_k", [0, 1, 5, 100])
@pytest.mark.parametrize("top_p", [0.05, 0.5, 0.95, 1.0])
def test_probabilities_are_those_of_transformers(temperature: float, top_k: int, top_p: float) -> None:
    logits = np.random.default_rng(0).normal(size=(20, 30)) * 3
    scores = TemperatureLogitsWarper(temperature)(None, torch.from_numpy(logits))
    if top_k:
        scores = TopKLogitsWarper(top_k)(None, scores)
    if top_p < 1:
        scores = TopPLogitsWarper(top_p)(None, scores)
    theirs = scores.softmax(-1).numpy()
    ours = Sampling(temperature=temperature, top_k=top_k, top_p=top_p).probabilities(logits)
    np.testing.assert_allclose(ours, theirs, atol=1e-12)


def test_a_token_without_probability_is_never_drawn() -> None:
    random = np.random.default_rng(0)
    weights = np.array([0.0, 0.5, 0.0, 0.5, 0.0])
    assert {draw(weights, random) for _ in range(1000)} == {1, 3}


@pytest.mark.parametrize("temperature", [5e-324, 1e-308, 1e-30, 9.9e-6])
def test_a_temperature_next_to_zero_is_greedy(temperature: float) -> None:
    assert Sampling(temperature).greedy


@pytest.mark.parametrize("scale", [1e-30, 1.0, 3e38])
@pytest.mark.parametrize("temperature", [LEAST_TEMPERATURE, 1e-3, 1.0, 1e308])
def test_probabilities_are_finite_for_any_finite_logits(temperature: float, scale: float) -> None:
    logits = np.array([[1.0, 1.0, -1.0, -np.inf], [-1.0, 0.5, 0.25, -1.0]]) * scale
    for top_k, top_p in ((0, 1.0), (2, 1.0), (0, 1e-300), (3, 0.9)):
        weights = Sampling(temperature, top_k, top_p).probabilities(logits)
        np.testing.assert_allclose(weights.sum(axis=1), 1.0)
        assert weights[0, 3] == 0.0
        assert (weights >= 0.0).all()


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("wrong", [np.nan, np.inf])
def test_a_row_without_numbers_is_found_and_has_no_distribution(dtype: torch.dtype, wrong: float) -> None:
    logits = torch.tensor([[1.0, 2.0, 0.0], [1.0, wrong, 0.0], [-np.inf, 0.0, -1.0], [-np.inf] * 3], dtype=dtype)
    assert finite_rows(logits, most_probable(logits)).tolist() == [True, False, True, False]
    with pytest.raises(SamplingError, match="not finite"):
        Sampling(1.0).probabilities(logits.double().numpy())


def test_a_draw_is_a_token_that_has_weight_whatever_is_rounded() -> None:
    class Most(np.random.Generator):
        def random(self) -> float:  # type: ignore[override]
            return 1.0

    assert draw(np.array([0.1, 0.7, 0.2, 0.0, 0.0]), Most(np.random.PCG64(0))) == 2
    assert draw(np.array([np.nan, 1.0]), Most(np.random.PCG64(0))) in (0, 1)


@pytest.mark.parametrize(
    ("setting", "key"),
    [
        ({"temperature": -0.1}, "temperature"),
        ({"temperature": float("nan")}, "temperature"),
        ({"top_k": -1}, "top_k"),
        ({"top_p": 0.0}, "top_p"),
        ({"top_p": 1.1}, "top_p"),
    ],
)
def test_settings_out_of_range_are_refused_by_name(setting: dict[str, float], key: str) -> None:
    with pytest.raises(SamplingError, match=key):
        Sampling(**setting)  # type: ignore[arg-type]
