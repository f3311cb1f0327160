"""Agreement of a drafter with its target: synthetic models that fix acceptance at every output position in advance."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import asdict
from typing import Annotated, Any

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

from engine.workload.markov import Agreement, FittedDrafter, MarkovChain, fitted

Probability = Annotated[float, Field(ge=0.0, le=1.0)]
Share = Annotated[float, Field(gt=0.0, lt=1.0)]
Positive = Annotated[float, Field(gt=0.0, allow_inf_nan=False)]
RankExponent = Annotated[float, Field(gt=1.0, le=20.0)]


class AgreementModel(BaseModel, ABC):
    """Interface of agreement models. Agreement is a function of (seed, request number, position) only."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    @property
    @abstractmethod
    def chain(self) -> MarkovChain:
        """The law of this model."""

    def draw(self, seed: int, request: NDArray[np.int64], output_tokens: NDArray[np.int32]) -> Agreement:
        """Agreement for requests numbered `request` (R,) with `output_tokens` (R,) output positions each."""
        return self.chain.draw(seed, request, output_tokens)

    def describe(self) -> dict[str, Any]:
        """Settings and fitted figures, for a workload's provenance; JSON-serialisable."""
        return {"model": type(self).__name__, **self.model_dump(), "chain": asdict(self.chain)}


class MarkovAgreement(AgreementModel):
    """A `MarkovChain`, its parameters checked."""

    base_mean: Probability
    base_concentration: Positive | None = None
    easy_share: Probability = MarkovChain.easy_share
    easy_logit: Annotated[float, Field(ge=0.0, le=20.0)] = MarkovChain.easy_logit
    persistence: Annotated[float, Field(ge=0.0, lt=1.0)] = MarkovChain.persistence
    momentum: Annotated[float, Field(ge=-5.0, le=5.0)] = MarkovChain.momentum
    rank_exponent: RankExponent = MarkovChain.rank_exponent
    confidence_concentration: Positive = MarkovChain.confidence_concentration
    confidence_temperature: Positive = MarkovChain.confidence_temperature

    @classmethod
    def of(cls, chain: MarkovChain) -> MarkovAgreement:
        """The model of this law."""
        return cls(**asdict(chain))

    @property
    def chain(self) -> MarkovChain:
        return MarkovChain(**dict(self))


class IidAgreement(AgreementModel):
    """Every position agrees with probability `alpha`, independently: the textbook model, for tests and baselines.

    Ranks and confidence as in `MarkovChain`.
    """

    alpha: Probability
    rank_exponent: RankExponent = MarkovChain.rank_exponent
    confidence_concentration: Positive = MarkovChain.confidence_concentration
    confidence_temperature: Positive = MarkovChain.confidence_temperature

    @property
    def chain(self) -> MarkovChain:
        return MarkovChain(
            base_mean=self.alpha,
            rank_exponent=self.rank_exponent,
            confidence_concentration=self.confidence_concentration,
            confidence_temperature=self.confidence_temperature,
        )


class DrafterAgreement(AgreementModel):
    """A drafter's fitted `MarkovChain` by name, with one knob: how often positions agree on average.

    `mean_agreement` (None = as fitted) moves the base's mean: for domain randomisation and for
    "what if the drafter were better".
    """

    drafter: FittedDrafter = "draft68m"
    mean_agreement: Share | None = None

    @property
    def chain(self) -> MarkovChain:
        return fitted(self.drafter, self.mean_agreement)
