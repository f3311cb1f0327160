"""Constraints on a request's next token: token ids allowed, banned, biased, or delayed."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True)
class Constraints:
    """Changes of the target's logits that follow from the tokens generated so far.

    They also apply to the target's logits after every candidate, so verification stays lossless: emitted tokens are
    distributed as if the target had generated them alone under the same rules.

    Args:
        allowed: the only token ids that may be generated; empty: all.
        bias: added to the logits of token ids.
        banned: sequences of token ids that must not occur in the output.
        ends: token ids that end an output; they must not occur among the first `min_tokens`.
        min_tokens: least tokens of an output.
    """

    allowed: Collection[int] = ()
    bias: Mapping[int, float] = field(default_factory=dict)
    banned: Sequence[tuple[int, ...]] = ()
    ends: Collection[int] = ()
    min_tokens: int = 0

    def __bool__(self) -> bool:
        return bool(self.allowed or self.bias or self.banned or (self.min_tokens and self.ends))

    def choices_left(self, vocab_size: int) -> bool:
        """Return True if at least one token is allowed at every position."""
        never = {sequence[-1] for sequence in self.banned} | set(self.ends if self.min_tokens else ())
        return bool(set(self.allowed) - never) if self.allowed else len(never) < vocab_size

    def apply(self, logits: NDArray[np.float64], output: Sequence[int], path: Sequence[int]) -> NDArray[np.float64]:
        """(V,) logits under the rules, for the token after `output` and the candidates of `path`."""
        changed = np.full_like(logits, -np.inf) if self.allowed else logits.copy()
        if self.allowed:
            allowed = list(self.allowed)
            changed[allowed] = logits[allowed]
        if self.bias:
            changed[list(self.bias)] += list(self.bias.values())
        if len(output) + len(path) < self.min_tokens:
            changed[list(self.ends)] = -np.inf
        for *before, last in self.banned:
            if not before or [*output[-len(before) :], *path][-len(before) :] == before:
                changed[last] = -np.inf
        return changed


FREE = Constraints()
