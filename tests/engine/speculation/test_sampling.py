"""Sampling settings mean what they mean in `transformers`."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from transformers.generation.logits_process import TemperatureLogitsWarper, TopKLogitsWarper, TopPLogitsWarper

from engine.speculation.sampling import Sampling, SamplingError, draw


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
