"""How a request's next token is chosen from logits: temperature, top-k, top-p, seed."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


class SamplingError(ValueError):
    """A sampling setting is out of range; the message names it."""


@dataclass(frozen=True)
class Sampling:
    """Sampling settings of one request.

    Args:
        temperature: 0 takes the most probable token (greedy); otherwise logits are divided by it.
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
        """Whether the most probable token is always taken."""
        return self.temperature == 0.0

    def generator(self) -> np.random.Generator:
        """A fresh random stream from the seed."""
        return np.random.default_rng(self.seed)

    def probabilities(self, logits: NDArray[np.floating]) -> NDArray[np.float64]:
        """The distributions that `logits` (rows, V) mean under these settings, (rows, V); not for greedy requests.

        Temperature, then top-k, then top-p, in the order and with the ties of `transformers`' generation.
        """
        if self.greedy:
            raise SamplingError("temperature=0 is greedy: there is no distribution to sample from")
        scores = np.asarray(logits, dtype=np.float64) / self.temperature
        if 0 < self.top_k < scores.shape[1]:
            least = np.partition(scores, -self.top_k, axis=1)[:, -self.top_k, None]
            scores = np.where(scores < least, -np.inf, scores)
        weights = np.exp(scores - scores.max(axis=1, keepdims=True))
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


def draw(weights: NDArray[np.float64], random: np.random.Generator) -> int:
    """A token drawn in proportion to `weights` (V,), which need not add up to 1; one uniform number is used."""
    cumulative = np.cumsum(weights)
    return int(np.searchsorted(cumulative, random.random() * cumulative[-1], side="right"))
