"""Prompt and output lengths: named data sets as quantile tables or lognormals, with their dependence."""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Any, Literal, NamedTuple, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, model_validator
from scipy.special import ndtr

from engine.workload.length_tables import LEVELS, LOGNORMALS, TABLES
from engine.workload.trace import read_lengths
from engine.workload.workload import WorkloadError

Tokens = Annotated[int, Field(ge=1, le=2**31 - 1)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
Correlation = Annotated[float, Field(gt=-1.0, lt=1.0)]


class Lengths(NamedTuple):
    """(R,) prompt tokens and (R,) output tokens, int64, each at least 1."""

    prompt_tokens: NDArray[np.int64]
    output_tokens: NDArray[np.int64]


class LengthModel(BaseModel, ABC):
    """Draws prompt and output lengths; the first R of a longer draw are those of a shorter one with the same seed."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @abstractmethod
    def draw(self, rng: np.random.Generator, num_requests: int) -> Lengths:
        """Lengths of `num_requests` requests."""

    def describe(self) -> dict[str, Any]:
        """Settings, for a workload's provenance; JSON-serialisable."""
        return {"model": type(self).__name__, **self.model_dump(mode="json")}


class FixedLengths(LengthModel):
    """Equal lengths for all requests: for experiments by hand and for checks against a formula."""

    prompt_tokens: Tokens
    output_tokens: Tokens

    def draw(self, rng: np.random.Generator, num_requests: int) -> Lengths:
        return Lengths(
            np.full(num_requests, self.prompt_tokens, dtype=np.int64),
            np.full(num_requests, self.output_tokens, dtype=np.int64),
        )


class LognormalLengths(LengthModel):
    """Lognormal prompts and outputs, rounded to at least 1, tied by a Gaussian copula with `correlation`.

    `*_median` is in tokens, `*_sigma` the standard deviation of the natural logarithm. `max_*` cut off by clipping; a
    total over `max_total_tokens` (None = any) shortens the prompt, as serving systems drop history.
    """

    prompt_median: Positive
    prompt_sigma: Annotated[float, Field(ge=0.0, le=5.0)]
    output_median: Positive
    output_sigma: Annotated[float, Field(ge=0.0, le=5.0)]
    correlation: Correlation = 0.0
    max_prompt_tokens: Tokens = 8192
    max_output_tokens: Tokens = 2048
    max_total_tokens: Annotated[int, Field(ge=2)] | None = None

    def draw(self, rng: np.random.Generator, num_requests: int) -> Lengths:
        prompt, output = _correlated_normals(rng, num_requests, self.correlation)
        return _bounded(
            _whole(self.prompt_median * np.exp(self.prompt_sigma * prompt), self.max_prompt_tokens),
            _whole(self.output_median * np.exp(self.output_sigma * output), self.max_output_tokens),
            self.max_total_tokens,
        )


class QuantileLengths(LengthModel):
    """Lengths by their quantiles, log-linear in between, tied by a Gaussian copula with `correlation`.

    `levels` rise from 0 to 1; `prompt_quantiles` and `output_quantiles` hold the tokens at these levels. A total over
    `max_total_tokens` (None = any) shortens the prompt, as the data sets with such a bound drop history.
    """

    levels: list[float]
    prompt_quantiles: list[Tokens]
    output_quantiles: list[Tokens]
    correlation: Correlation = 0.0
    max_total_tokens: Annotated[int, Field(ge=2)] | None = None

    @model_validator(mode="after")
    def _tables(self) -> Self:
        if len(self.levels) < 2 or self.levels[0] != 0.0 or self.levels[-1] != 1.0 or min(np.diff(self.levels)) <= 0:
            raise ValueError("levels must rise strictly from 0 to 1")
        for name in ("prompt_quantiles", "output_quantiles"):
            table = getattr(self, name)
            if len(table) != len(self.levels) or min(np.diff(table)) < 0:
                raise ValueError(f"{name} must hold {len(self.levels)} non-decreasing numbers, one for each level")
        return self

    def draw(self, rng: np.random.Generator, num_requests: int) -> Lengths:
        prompt, output = _correlated_normals(rng, num_requests, self.correlation)
        return _bounded(
            _whole(self._at(ndtr(prompt), self.prompt_quantiles), None),
            _whole(self._at(ndtr(output), self.output_quantiles), None),
            self.max_total_tokens,
        )

    def _at(self, level: NDArray[np.float64], quantiles: list[int]) -> NDArray[np.float64]:
        return np.exp(np.interp(level, self.levels, np.log(quantiles)))


class FileLengths(LengthModel):
    """Lengths drawn with replacement from the requests of a file: a trace's, or one of lengths only.

    Raises:
        WorkloadError: naming file and row, when they are drawn.
    """

    path: Path

    def draw(self, rng: np.random.Generator, num_requests: int) -> Lengths:
        prompt, output = read_lengths(self.path)
        drawn = rng.integers(prompt.size, size=num_requests)
        return Lengths(prompt[drawn], output[drawn])


class NamedLengths(LengthModel):
    """A data set's lengths by name; `length_tables.py` lists the source of each figure and marks estimates.

    `prompt_scale` and `output_scale` multiply the lengths: for domain randomisation, or to match a longer product. A
    total over `max_total_tokens` (None = any) shortens the prompt.
    """

    name: Literal[
        "lmsys_chat_1m",
        "lmsys_chat_1m_4k",
        "cnn_dailymail",
        "bigcodebench",
        "sharegpt",
        "arxiv",
        "specbench",
        "azure_conv",
        "azure_code",
    ]
    prompt_scale: Positive = 1.0
    output_scale: Positive = 1.0
    max_total_tokens: Annotated[int, Field(ge=2)] | None = None

    @property
    def model(self) -> LengthModel:
        """The fitted law of this name."""
        if self.name in TABLES:
            return QuantileLengths(levels=list(LEVELS), **TABLES[self.name])
        return LognormalLengths(**LOGNORMALS[self.name])

    def draw(self, rng: np.random.Generator, num_requests: int) -> Lengths:
        drawn = self.model.draw(rng, num_requests)
        return _bounded(
            _whole(drawn.prompt_tokens * self.prompt_scale, None),
            _whole(drawn.output_tokens * self.output_scale, None),
            self.max_total_tokens,
        )


def _correlated_normals(
    rng: np.random.Generator, num_requests: int, correlation: float
) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    if num_requests < 1:
        raise WorkloadError(f"{num_requests} requests: a draw needs at least one")
    # By rows, so that request r uses the same numbers however many requests follow.
    normal = rng.standard_normal((num_requests, 2))
    return normal[:, 0], correlation * normal[:, 0] + math.sqrt(1.0 - correlation**2) * normal[:, 1]


def _whole(tokens: NDArray[np.floating[Any]], most: int | None) -> NDArray[np.int64]:
    return np.clip(np.rint(tokens), 1, 2**31 - 1 if most is None else most).astype(np.int64)


def _bounded(prompt: NDArray[np.int64], output: NDArray[np.int64], max_total_tokens: int | None) -> Lengths:
    if max_total_tokens is None:
        return Lengths(prompt, output)
    output = np.minimum(output, max_total_tokens - 1)
    return Lengths(np.minimum(prompt, max_total_tokens - output), output)
