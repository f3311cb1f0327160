"""One request's prompt, settings and output so far."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Protocol

import numpy as np
from numpy.typing import NDArray

from engine.backends.torch.logprobs import TokenLogprob
from engine.speculation.constraints import FREE, Constraints
from engine.speculation.sampling import Sampling


class Ending(Protocol):
    """Finds the end of an output in tokens about to be emitted, each of which is passed in once and in order."""

    def __call__(self, tokens: list[int]) -> int | None:
        """Number of leading `tokens` that belong to the output, which then ends; None: it continues."""


@dataclass(slots=True)
class Generation:
    """A request's parameters and its output so far."""

    prompt: NDArray[np.int32]
    sampling: Sampling
    stop: frozenset[int]
    """Tokens that end the output; the one that does is part of it."""
    ending: Ending | None
    random: np.random.Generator
    constraints: Constraints = FREE
    logprobs: int | None = None
    """Number of most probable tokens whose log probabilities are recorded beside the output's; None: record none."""
    prompt_logprobs: bool = False
    """True to record those of the prompt too."""
    prompt_scored: list[TokenLogprob] = field(default_factory=list)
    """Log probabilities of the prompt's tokens from the second on, as far as they are known."""
    output: list[int] = field(default_factory=list)
    stopped: bool = False
    """True once a stop token or `ending` has ended the output."""
    greedy: bool = field(init=False)
    """True if its next token is always the most probable one."""
    may_stop: bool = field(init=False)
    """True if something other than its limit can end the output."""
    constrained: bool = field(init=False)
    """True if its constraints have an effect."""

    def __post_init__(self) -> None:
        self.greedy = self.sampling.greedy
        self.may_stop = bool(self.stop) or self.ending is not None
        self.constrained = bool(self.constraints)

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Prompt and output."""
        return np.concatenate((self.prompt, np.array(self.output, dtype=np.int32)))

    def until_stop(self, tokens: list[int]) -> int:
        """Number of the next `tokens` that belong to the output; sets `stopped` if they end it. Call once per token."""
        count = len(tokens)
        if self.stop:
            for place, token in enumerate(tokens, start=1):
                if token in self.stop:
                    count, self.stopped = place, True
                    break
        if self.ending is not None:
            found = self.ending(tokens[:count])
            if found is not None:
                count, self.stopped = found, True
        return count
