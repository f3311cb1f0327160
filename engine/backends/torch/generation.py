"""One request's prompt, settings and output so far."""

from __future__ import annotations

from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray

from engine.speculation.sampling import Sampling


@dataclass(slots=True)
class Generation:
    """What the client asked for and what it has got."""

    prompt: NDArray[np.int32]
    sampling: Sampling
    stop: frozenset[int]
    """Tokens that end the output; the one that does is part of it."""
    random: np.random.Generator
    output: list[int] = field(default_factory=list)

    @property
    def tokens(self) -> NDArray[np.int32]:
        """Prompt and output."""
        return np.concatenate((self.prompt, np.array(self.output, dtype=np.int32)))

    def until_stop(self, tokens: list[int]) -> int:
        """How many of `tokens` belong to the output: up to the first stop token, that one included."""
        if self.stop:
            for count, token in enumerate(tokens, start=1):
                if token in self.stop:
                    return count
        return len(tokens)
