"""Sampling of a request's next token from logits: temperature, top-k, top-p, seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

LEAST_TEMPERATURE = 1e-5
"""Below it a request is greedy, because scaled differences of logits may overflow a float."""


class SamplingError(ValueError):
    """A sampling setting is out of range, or logits are not finite; the message says which."""


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of one request.

    Args:
        temperature: logits are divided by it; below `LEAST_TEMPERATURE` the most probable token is taken (greedy).
        top_k: only the k most probable tokens; 0 keeps all.
        top_p: only the most probable tokens that together reach this probability; 1 keeps all.
        seed: of the request's own random stream, which no other request touches.
    """

    temperature: float = 0.0
    top_k: int = 0
    top_p: float = 1.0
    seed: int = 0

    def __post_init__(self) -> None:
        if not 0.0 <= self.temperature < np.inf:
            raise SamplingError(f"temperature={self.temperature} must be 0 (greedy) or a positive number")
        if self.top_k < 0:
            raise SamplingError(f"top_k={self.top_k} must be 0 (all tokens) or a positive number of tokens")
        if not 0.0 < self.top_p <= 1.0:
            raise SamplingError(f"top_p={self.top_p} must be above 0 and at most 1")

    @property
    def greedy(self) -> bool:
        """True if the most probable token is always taken."""
        return self.temperature < LEAST_TEMPERATURE

    def generator(self) -> np.random.Generator:
        """A fresh random stream from the seed."""
        return np.random.default_rng(self.seed)

    def probabilities(self, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """Distributions of `logits` (rows, V) under these settings, (rows, V); not for greedy requests.

        Temperature, then top-k, then top-p, in the order and with the ties of `transformers`' generation.

        Raises SamplingError for a row whose highest logit is not finite (`finite_rows`).
        """
        if self.greedy:
            raise SamplingError(f"temperature={self.temperature} is greedy: there is no distribution to sample from")
        scores = np.asarray(logits, dtype=np.float64)
        highest = scores.max(axis=1, keepdims=True)
        if not np.isfinite(highest).all():
            raise SamplingError("the highest of a row of logits is not finite: there is no distribution to sample from")
        scores = (scores - highest) / self.temperature
        if 0 < self.top_k < scores.shape[1]:
            least = np.partition(scores, -self.top_k, axis=1)[:, -self.top_k, None]
            scores = np.where(scores < least, -np.inf, scores)
        weights = np.exp(scores)
        weights /= weights.sum(axis=1, keepdims=True)
        if self.top_p < 1.0:
            order = np.argsort(weights, axis=1, kind="stable")
            below = np.cumsum(np.take_along_axis(weights, order, axis=1), axis=1) <= 1.0 - self.top_p
            below[:, -1] = False
            drop = np.zeros_like(below)
            np.put_along_axis(drop, order, below, axis=1)
            weights = np.where(drop, 0.0, weights)
            weights /= weights.sum(axis=1, keepdims=True)
        return weights


GREEDY = Sampling()


def most_probable(logits: Any) -> NDArray[np.int64]:
    """(rows,) tokens with the highest of `logits` (rows, V), a tensor; on a CPU numpy is ten times faster at it."""
    if logits.device.type == "cpu" and logits.element_size() >= 4:
        found: NDArray[np.int64] = logits.numpy().argmax(-1)
    else:
        found = logits.argmax(-1).cpu().numpy()
    return found


def finite_rows(logits: Any, highest: NDArray[np.integer]) -> NDArray[np.bool_]:
    """(rows,) True where the highest of `logits` (rows, V), a tensor, is finite, given its token ids (rows,).

    NaN counts as highest, so that False means a NaN or an infinity anywhere in the row, -inf beside finite logits
    aside: such a token has probability 0.
    """
    if logits.device.type == "cpu" and logits.element_size() >= 4:
        found: NDArray[np.bool_] = np.isfinite(logits.numpy()[np.arange(len(highest)), highest])
    else:
        import torch

        at = torch.from_numpy(highest).to(logits.device)[:, None]
        found = logits.gather(1, at)[:, 0].isfinite().cpu().numpy()
    return found


def draw(weights: NDArray[np.float64], random: np.random.Generator) -> int:
    """A token drawn in proportion to `weights` (V,), which need not add up to 1; one uniform number is used.

    Rounding never draws a token past the last one that adds anything.
    """
    cumulative = np.cumsum(weights)
    drawn = np.searchsorted(cumulative, random.random() * cumulative[-1], side="right")
    return int(min(drawn, np.searchsorted(cumulative, cumulative[-1])))
