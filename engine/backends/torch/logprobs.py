"""Log probabilities of tokens under the model's own logits, before temperature and any other setting."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch

ROWS_AT_ONCE = 256
"""Rows of logits processed at a time, which bounds the memory of a long prompt."""


class TokenLogprob(NamedTuple):
    """A token's log probability in its place, and those of the most probable tokens there, falling."""

    token: int
    logprob: float
    top: list[tuple[int, float]]


def token_logprobs(logits: torch.Tensor, rows: Sequence[int], tokens: Sequence[int], top: int) -> list[TokenLogprob]:
    """Log probabilities of `tokens[i]` under row `rows[i]` of `logits` (R, V), and of that row's `top` tokens."""
    found: list[TokenLogprob] = []
    for first in range(0, len(rows), ROWS_AT_ONCE):
        here = slice(first, first + ROWS_AT_ONCE)
        logarithms = logits[torch.tensor(rows[here], device=logits.device)].double().log_softmax(-1)
        wanted = torch.tensor(tokens[here], device=logits.device)[:, None]
        chosen = logarithms.gather(-1, wanted)[:, 0].tolist()
        values, ids = logarithms.topk(min(top, logarithms.shape[-1]), dim=-1)
        for token, logprob, *best in zip(tokens[here], chosen, ids.tolist(), values.tolist(), strict=True):
            found.append(TokenLogprob(token, logprob, list(zip(*best, strict=True))))
    return found
