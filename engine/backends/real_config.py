"""Validated configuration shared by all engines that run a model."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import Annotated, Any, ClassVar, Self

from pydantic import BaseModel, ConfigDict, Field

from engine.backends.real import RealEngine
from engine.limits import EngineLimits
from engine.speculation.allocation import Speculation


class RealEngineConfig(BaseModel, ABC):
    """Settings of every engine that runs a model.

    Args:
        name: name in reports.
        max_num_seqs: most requests in one batch.
        max_model_len: most prompt + output tokens of one request.
        block_size: tokens per KV block.
        profile: the engine yaml that `runs.profile` wrote for this engine on this machine, from which controllers
            predict iteration times; None: controllers that predict are refused.
        trust_remote_code: run Python code from a model's folder or hub page, without asking.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    unnamed: ClassVar[frozenset[str]] = frozenset({"name", "max_num_seqs", "max_model_len", "block_size", "profile"})
    """Settings that `name` covers, and settings of the engine's capacity."""

    name: str
    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] = 64
    max_model_len: Annotated[int, Field(ge=2)] = 2048
    block_size: Annotated[int, Field(ge=1, le=1024)] = 16
    profile: Path | None = None
    trust_remote_code: bool = False

    @property
    def variant(self) -> str:
        """`name`, and all settings that change speed or text and differ from their defaults.

        Two runs are compared as runs of one engine only if these are equal.
        """
        settings = self.model_dump(mode="json", exclude=set(self.unnamed))
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        return " ".join([self.name, *(f"{key}={value}" for key, value in settings.items() if value != defaults[key])])

    @property
    @abstractmethod
    def speculation(self) -> Speculation:
        """Allocation of an action's candidates."""

    @abstractmethod
    def governed_by(self, speculation: Speculation | None) -> Self:
        """The same engine with the allocation that a controller asks for; None: as it is configured.

        Raises ValueError for an allocation that the engine does not support.
        """

    @property
    @abstractmethod
    def limits(self) -> EngineLimits:
        """Scheduler limits, as they follow from the cache."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """The target's tokenizer."""

    @abstractmethod
    def build(self, *, ttft_target: float, queue_rows: int = 64) -> RealEngine:
        """Load the models and return the engine; its clock starts when this returns."""


def refuse_sharing(asked_for: Speculation) -> ValueError:
    """Error for a controller that asks a real engine for an allocation that only simulated engines have."""
    return ValueError(
        f"this controller needs candidates shared out by {asked_for.variant!r}, which only simulated engines "
        "do; choose another controller, or a simulated engine (engine=vicuna_7b_a100, or a profile of this one)"
    )
