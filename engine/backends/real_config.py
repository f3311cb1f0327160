"""What every engine that runs a model is configured with, validated."""

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
        name: how reports call it.
        max_num_seqs: most requests in one batch.
        max_model_len: most prompt + output tokens of one request.
        block_size: tokens per KV block.
        profile: the engine yaml that `runs.profile` wrote for this engine on this machine, from which controllers
            predict iteration times; None: there is none, and controllers that predict are refused.
        trust_remote_code: run Python code that a model's folder or hub page brings with it. Nobody is asked.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    unnamed: ClassVar[frozenset[str]] = frozenset({"name", "max_num_seqs", "max_model_len", "block_size", "profile"})
    """Settings that `name` stands for, or that say what the engine has room for."""

    name: str
    max_num_seqs: Annotated[int, Field(ge=1, le=4096)] = 64
    max_model_len: Annotated[int, Field(ge=2)] = 2048
    block_size: Annotated[int, Field(ge=1, le=1024)] = 16
    profile: Path | None = None
    trust_remote_code: bool = False

    @property
    def variant(self) -> str:
        """`name`, and what differs from the defaults of that which changes speed or text.

        Two runs are compared as runs of one engine only if these are equal.
        """
        settings = self.model_dump(mode="json", exclude=set(self.unnamed))
        defaults = {name: field.default for name, field in type(self).model_fields.items()}
        return " ".join([self.name, *(f"{key}={value}" for key, value in settings.items() if value != defaults[key])])

    @property
    @abstractmethod
    def speculation(self) -> Speculation:
        """How the candidates of an action are shared out."""

    @abstractmethod
    def governed_by(self, speculation: Speculation | None) -> Self:
        """The same engine sharing candidates as a controller asks for; None: as it is configured.

        Raises ValueError for what the engine cannot do.
        """

    @property
    @abstractmethod
    def limits(self) -> EngineLimits:
        """What a scheduler knows of the cache."""

    @abstractmethod
    def tokenizer(self) -> Any:
        """The target's tokenizer."""

    @abstractmethod
    def build(self, *, ttft_target: float, queue_rows: int = 64) -> RealEngine:
        """Load the models and return the engine; its clock starts when this returns."""


def refuse_sharing(asked_for: Speculation) -> ValueError:
    """What a controller is told that asks a real engine for a sharing of candidates that only simulated ones have."""
    return ValueError(
        f"this controller needs candidates shared out by {asked_for.variant!r}, which only simulated engines "
        "do; choose another controller, or a simulated engine (engine=vicuna_7b_a100, or a profile of this one)"
    )
