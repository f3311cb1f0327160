"""Held-out evaluation of the two embedded models: losses, and acceptance under speculation."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.nn import functional

from engine.models.corpus import Tokenizer, held_out_prompts

DRAFTED_TOKENS = 6
LOOKUP_SUFFIXES = (3, 2)
_ROWS_A_FORWARD = 8


@torch.no_grad()
def token_losses(model: Any, windows: Tensor) -> Tensor:
    """Cross-entropy (nats) of every next token: windows (n, length) of token ids -> (n, length - 1)."""
    losses = []
    for rows in windows.split(_ROWS_A_FORWARD):
        logits = model(input_ids=rows[:, :-1], use_cache=False).logits
        losses.append(functional.cross_entropy(logits.transpose(1, 2).float(), rows[:, 1:], reduction="none"))
    return torch.cat(losses)


@torch.no_grad()
def greedy_continuations(target: Any, prompts: Tensor, new_tokens: int) -> Tensor:
    """The target's greedy text: prompts (n, length) -> (n, length + new_tokens); the end of text is never chosen."""
    texts: Tensor = target.generate(
        prompts,
        attention_mask=torch.ones_like(prompts),
        do_sample=False,
        max_new_tokens=new_tokens,
        min_new_tokens=new_tokens,
        pad_token_id=0,
    )
    return texts


@torch.no_grad()
def drafter_agreement(drafter: Any, texts: Tensor, prompt_tokens: int) -> NDArray[np.bool_]:
    """True where the drafter's first choice is the target's token: texts (n, length) -> (n, length - prompt_tokens).

    One forward over the target's own text suffices: while every draft is accepted, a greedy drafter's context is the
    target's text.
    """
    choices = [
        drafter(input_ids=rows[:, :-1], use_cache=False).logits[:, prompt_tokens - 1 :].argmax(-1)
        for rows in texts.split(_ROWS_A_FORWARD)
    ]
    return (torch.cat(choices) == texts[:, prompt_tokens:]).numpy()


def lookup_agreement(
    texts: NDArray[np.int64], prompt_tokens: int, suffixes: Sequence[int] = LOOKUP_SUFFIXES
) -> tuple[NDArray[np.bool_], NDArray[np.bool_]]:
    """Prompt lookup of the next token at each generated position: (proposed, right), both (n, length - prompt_tokens).

    The proposal is the token after the latest earlier occurrence of the text's last tokens, of the longest suffix
    length in `suffixes` that has one (A. Saxena, "Prompt Lookup Decoding", 2023).
    """
    proposed = np.zeros((len(texts), texts.shape[1] - prompt_tokens), bool)
    right = np.zeros_like(proposed)
    for row, text in enumerate(texts.tolist()):
        follower: dict[tuple[int, ...], int] = {}
        for position, token in enumerate(text):
            before = [tuple(text[position - n : position]) for n in suffixes if n <= position]
            if position >= prompt_tokens:
                found = next((follower[suffix] for suffix in before if suffix in follower), None)
                proposed[row, position - prompt_tokens] = found is not None
                right[row, position - prompt_tokens] = found == token
            follower.update((suffix, token) for suffix in before)
    return proposed, right


def conditional_acceptance(agreement: NDArray[np.bool_], drafted: int) -> tuple[list[float], float]:
    """Greedy acceptance of chains of `drafted` tokens: by position where it is reached, and tokens a step.

    `agreement` is (n, positions). Steps are taken as decoding takes them: each starts after the token that ended the
    one before, and steps whose chain would pass the end of the text are left out. A position never reached is NaN.
    """
    reached = np.zeros(drafted)
    accepted = np.zeros(drafted)
    steps = 0
    for row in agreement:
        start = 1  # the first token of a text is the prefill's, which is never drafted
        while start + drafted <= row.size:
            chain = row[start : start + drafted]
            run = drafted if chain.all() else int(chain.argmin())
            accepted[:run] += 1
            reached[: min(run + 1, drafted)] += 1
            steps += 1
            start += run + 1
    share = np.divide(accepted, reached, out=np.full(drafted, np.nan), where=reached > 0)
    return [float(value) for value in share], float(1 + accepted.sum() / steps) if steps else float("nan")


def speculation_figures(
    target: Any, drafter: Any, tokenizer: Tokenizer, prompts: int, prompt_tokens: int, new_tokens: int, seed: int = 0
) -> dict[str, Any]:
    """Drafter and prompt-lookup acceptance on the target's greedy continuations of held-out prompts."""
    cut = held_out_prompts(tokenizer, [prompt_tokens] * prompts, seed)
    texts = greedy_continuations(
        target, torch.from_numpy(np.stack([prompt.tokens for prompt in cut])).long(), new_tokens
    )
    agreement = drafter_agreement(drafter, texts, prompt_tokens)
    acceptance, tokens_a_step = conditional_acceptance(agreement, DRAFTED_TOKENS)
    proposed, right = lookup_agreement(texts.numpy(), prompt_tokens)
    return {
        "prompts": prompts,
        "prompt_tokens": prompt_tokens,
        "new_tokens": new_tokens,
        "drafted_tokens": DRAFTED_TOKENS,
        "drafter_agreement": round(float(agreement[:, 1:].mean()), 4),
        "drafter_acceptance_by_position": [round(value, 4) for value in acceptance],
        "drafter_tokens_per_step": round(tokens_a_step, 4),
        "lookup_suffix_tokens": list(LOOKUP_SUFFIXES),
        "lookup_proposal_rate": round(float(proposed[:, 1:].mean()), 4),
        "lookup_hit_rate": round(float(right[:, 1:].sum() / max(1, proposed[:, 1:].sum())), 4),
    }
