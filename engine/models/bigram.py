"""Models of random weights whose text follows a successor table, with a drafter of realistic agreement.

A model of random weights repeats itself after a few tokens, and a second one never agrees with it. Here, too, every
matrix is random and every product is computed in full. But the outputs of attention and MLP are tiny, so the hidden
state is the embedding of the last token, and the output projection determines the next token. The target's text is one
cycle through the vocabulary. The drafter ranks candidates for every token, with or without the target's, and gives them
probabilities. A `MarkovChain` draws agreement along the cycle as it does along the positions of requests, so that runs
of agreements and confidences along an output follow its law.

Forward passes, verification and outputs are real, and greedy acceptance has a real drafter's statistics. The text has
no meaning: two prompts that end in the same token continue alike. Agreement at a token depends only on the previous
token, so requests differ as much as their sections of the cycle.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from engine.workload.markov import MarkovChain

SPECIAL_TOKENS = 3
"""The first ids begin, end or fill a text; no token is followed by one of them."""

PROPOSED = 4
"""Candidates that the drafter ranks for every token; the target's, where it is none of them, is one of the rest."""

STRETCH = 256
"""Tokens along the cycle that are drawn as one request's positions."""

_CYCLE, _AGREEMENT, _TARGET, _DRAFTER = range(4)
"""Streams of random numbers, each seeded with (seed, stream)."""

_CERTAIN = 1.0 - 1e-4
"""The target's probability of the successor."""

_CONFIDENCE = (1.0 / 64.0, 1.0 - 1e-3)
"""Bounds of confidences, so that logits stay moderate."""

_STEP = 0.8
"""A candidate is at most this much as probable as the one before: three steps of bfloat16 between their logits."""

_TARGET_NOISE, _DRAFTER_NOISE = 2.0, 1.0
"""Standard deviation of noise logits, without the contribution of the meaningful ones.

Large enough for a logit's rounding in bfloat16 to be small beside it (`PagedModel` compares the two), small enough for
no such logit to be among the best.
"""

_DAMPING = 1e-4
"""Scale of the outputs of attention and MLP in the residual stream, where an embedding's entries have variance 1."""

_ROWS = 2048


class Table(NamedTuple):
    """Next-token predictions of a model after each of V tokens.

    successor: (V,) next token in the target's text · proposals: (V, K) distinct tokens, falling in probability ·
    probabilities: (V, K), the rest being spread over all other tokens · rank: (V,) of the successor among the
    proposals; K where it is none.
    """

    successor: NDArray[np.int64]
    proposals: NDArray[np.int64]
    probabilities: NDArray[np.float64]
    rank: NDArray[np.int64]


def target_table(vocabulary: int, seed: int) -> Table:
    """The target's table: one certain successor each."""
    cycle, place = _cycle(vocabulary, seed)
    successor = cycle[(place + 1) % len(cycle)]
    return Table(successor, successor[:, None], np.full((vocabulary, 1), _CERTAIN), np.zeros(vocabulary, np.int64))


def drafter_table(vocabulary: int, seed: int, law: MarkovChain) -> Table:
    """The drafter's table, for the target of the same vocabulary and seed.

    The first candidate's probability is the drawn confidence, and it is the target's token that often. Further
    candidates share the rest by the law of ranks, each with less than the one before. Where this is less than the law's
    share, the drawn rank is discarded as often, so that every candidate is right as often as it is probable. Of the
    misses of `draft68m` 42 % are then among ranks 1 to 3; the law alone has 51 %.
    """
    cycle, place = _cycle(vocabulary, seed)
    size = len(cycle)
    random = np.random.default_rng([seed, _AGREEMENT])
    lengths = np.full(-(-size // STRETCH), STRETCH, dtype=np.int32)
    drawn = law.draw(seed, np.arange(len(lengths)), lengths)
    rank = np.minimum(drawn.rank[:size].astype(np.int64), PROPOSED)
    first = np.clip(drawn.confidence[:size].astype(np.float64), *_CONFIDENCE)
    shares = np.bincount(law.rank_quantiles, minlength=PROPOSED + 1)[1:PROPOSED] / len(law.rank_quantiles)
    by_law = (1.0 - first)[:, None] * shares
    probabilities = np.empty((size, PROPOSED))
    probabilities[:, 0] = first
    for k in range(1, PROPOSED):
        probabilities[:, k] = np.minimum(by_law[:, k - 1], _STEP * probabilities[:, k - 1])
    missed = np.flatnonzero((rank > 0) & (rank < PROPOSED))
    kept = probabilities[missed, rank[missed]] / by_law[missed, rank[missed] - 1]
    rank[missed[random.random(len(missed)) >= kept]] = PROPOSED
    ahead = np.tile(1 + random.choice(np.arange(1, size), PROPOSED, replace=False), (size, 1))
    hit = np.flatnonzero(rank < PROPOSED)
    ahead[hit, rank[hit]] = 1
    return Table(
        cycle[(place + 1) % size],
        cycle[(place[:, None] + ahead[place]) % size],
        probabilities[place],
        rank[place],
    )


def bigram_target(config: Any, seed: int, *, dtype: torch.dtype, device: torch.device) -> Any:
    """A target of random weights, a `transformers` model on the device; see `drafter_table` for its drafter."""
    table = target_table(config.vocab_size, seed)
    return _build(config, table, _TARGET_NOISE, (seed, _TARGET), dtype, device)


def bigram_drafter(config: Any, seed: int, law: MarkovChain, *, dtype: torch.dtype, device: torch.device) -> Any:
    """A drafter for the target of the same seed and vocabulary, with agreement by `law`."""
    table = drafter_table(config.vocab_size, seed, law)
    return _build(config, table, _DRAFTER_NOISE, (seed, _DRAFTER), dtype, device)


def logits_of(table: Table, hidden: int, noise: float) -> NDArray[np.float64]:
    """(V, K) logits of the proposals that give them their probabilities, over `hidden` random dimensions.

    All other logits are normal. Embeddings of H entries of variance 1 have products of variance H, so a row of the
    output projection made for logits a_1, a_2, ... adds sum(a^2) / H to the variance of its logits elsewhere. The
    probabilities depend on the sum of the exponentials and vice versa: solved by fixed-point iteration. Raises
    ValueError when there are too few dimensions for the vocabulary.
    """
    vocabulary = len(table.successor)
    odds = np.log(table.probabilities) - np.log1p(-table.probabilities.sum(axis=1, keepdims=True))
    rest = np.log(vocabulary)
    for _ in range(100):
        squares = np.bincount(table.proposals.ravel(), ((odds + rest) ** 2).ravel(), minlength=vocabulary)
        variance = noise**2 + squares / hidden
        before, rest = rest, np.logaddexp.reduce(variance / 2.0)
        if abs(rest - before) < 1e-6:
            return odds + rest
        if not np.isfinite(rest) or variance.max() > vocabulary:
            break
    raise ValueError(f"{hidden} dimensions are too few to tell {vocabulary} tokens apart; choose a wider shape")


def _cycle(vocabulary: int, seed: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Tokens in the order of the target's text, and the (V,) position of each; special ones share others' positions."""
    cycle = np.random.default_rng([seed, _CYCLE]).permutation(np.arange(SPECIAL_TOKENS, vocabulary))
    place = np.empty(vocabulary, dtype=np.int64)
    place[cycle] = np.arange(len(cycle))
    place[:SPECIAL_TOKENS] = np.arange(SPECIAL_TOKENS)
    return cycle, place


def _build(
    config: Any, table: Table, noise: float, seed: tuple[int, int], dtype: torch.dtype, device: torch.device
) -> Any:
    """The model; its weights are made in place, in their final type, because memory may not hold a second copy."""
    from transformers import AutoModelForCausalLM

    with torch.device("meta"):
        model: Any = AutoModelForCausalLM.from_config(config, dtype=dtype)
    model = model.to_empty(device=device).eval()
    # `to_empty` leaves its buffers uninitialised.
    model.model.rotary_emb = type(model.model.rotary_emb)(config).to(device)
    generator = torch.Generator(device)
    generator.manual_seed(int(np.random.SeedSequence(seed).generate_state(1, np.uint64)[0] >> np.uint64(1)))
    head = model.lm_head.weight
    with torch.no_grad():
        for name, weight in model.named_parameters():
            if weight.dim() == 1:
                weight.fill_(1.0)
            elif weight is model.model.embed_tokens.weight:
                weight.normal_(generator=generator)
            elif weight is not head:
                damping = _DAMPING if name.endswith(("o_proj.weight", "down_proj.weight")) else 1.0
                weight.normal_(std=damping * weight.shape[1] ** -0.5, generator=generator)
        _fill_head(model, table, noise, generator)
    return model


def _fill_head(model: Any, table: Table, noise: float, generator: torch.Generator) -> None:
    """Make the rows of the output projection: noise, plus the terms that give the proposals their exact logits.

    A row combines the few embeddings after which its token is proposed. Their mutual products are not quite zero, so
    their factors in the row come from a linear solve.
    """
    head, embedding = model.lm_head.weight, model.model.embed_tokens.weight
    vocabulary, hidden = head.shape
    precise = torch.promote_types(head.dtype, torch.float32)
    after, wanted, used = _by_token(table, logits_of(table, hidden, noise))
    for begin in range(0, vocabulary, _ROWS):
        rows = slice(begin, begin + _ROWS)
        mask = torch.from_numpy(used[rows]).to(head.device, precise)
        states = model.model.norm(embedding[torch.from_numpy(after[rows]).to(head.device)]).to(precise)
        states *= mask[:, :, None]
        made = torch.randn(len(mask), hidden, dtype=precise, device=head.device, generator=generator)
        made *= noise * hidden**-0.5
        gram = states @ states.mT / hidden + torch.diag_embed(1.0 - mask)
        missing = torch.from_numpy(wanted[rows]).to(head.device, precise)[:, :, None] - states @ made[:, :, None]
        made += (torch.linalg.solve(gram, missing) * mask[:, :, None] / hidden).mT.matmul(states)[:, 0]
        head[rows] = made.to(head.dtype)


def _by_token(table: Table, logits: NDArray[np.float64]) -> tuple[NDArray[np.int64], Any, NDArray[np.bool_]]:
    """(V, W) each: the tokens after which a token is proposed, with which logits, and which entries hold any."""
    vocabulary, width = table.proposals.shape
    proposed = table.proposals.ravel()
    counts = np.bincount(proposed, minlength=vocabulary)
    order = np.argsort(proposed, kind="stable")
    used = np.arange(counts.max()) < counts[:, None]
    after, wanted = np.zeros(used.shape, dtype=np.int64), np.zeros(used.shape)
    after[used], wanted[used] = order // width, logits.ravel()[order]
    return after, wanted, used
