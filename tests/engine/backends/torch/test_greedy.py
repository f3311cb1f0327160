"""Greedy outputs are those of `model.generate`, token by token, however the engine is driven."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest

from engine.backends.torch.engine import TorchEngine
from tests.engine.backends.torch.models import assert_generates_as_target, engine, limits, paged, prompts
from tests.engine.backends.torch.models import model as tiny
from tests.engine.core.cases import Figures

LENGTHS = (3, 10, 30, 17, 44, 5, 9, 1)
MAX_TOKENS = 24

_serve = partial(assert_generates_as_target, lengths=LENGTHS, max_tokens=MAX_TOKENS)


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2", "mistral_window"])
@pytest.mark.parametrize("draft_with", ["none", "ngram", "copy", "model"])
def test_every_model_and_drafter_generates_what_the_target_alone_does(kind: str, draft_with: str) -> None:
    served = engine(kind, draft_with, limits())
    _serve(served, [(3, 16)], kind)
    state = Figures(served.state)
    if draft_with != "none":
        assert state["drafted"] > 0
    if draft_with == "copy":
        assert state["accepted"] == state["drafted"], "the target's own choices are always accepted"
    if draft_with == "ngram":
        assert state["accepted"] > 0


@pytest.mark.parametrize("draft_with", ["ngram", "copy", "model"])
@pytest.mark.parametrize("candidates", range(9))
def test_any_number_of_candidates_gives_the_same_tokens(draft_with: str, candidates: int) -> None:
    served = engine("llama", draft_with, limits())
    _serve(served, [(candidates, 64)], "llama")
    state = Figures(served.state)
    assert (state["drafted"] > 0) == (candidates > 0)
    if draft_with == "copy":
        assert state["accepted"] == state["drafted"]


@pytest.mark.parametrize("token_budget", [1, 2, 7, 16, 33, 128, 2048])
def test_any_chunk_size_gives_the_same_tokens(token_budget: int) -> None:
    _serve(engine("llama", "ngram", limits()), [(2, token_budget)], "llama")


def test_changing_c_and_n_in_every_iteration_gives_the_same_tokens() -> None:
    """c falls to 0 and comes back, so the drafter has tokens to catch up on."""
    random = np.random.default_rng(5)
    actions = [(int(random.integers(0, 9)), int(random.integers(1, 40))) for _ in range(50)]
    for draft_with in ("copy", "model"):
        served = engine("llama", draft_with, limits())
        _serve(served, actions, "llama")
        state = Figures(served.state)
        if draft_with == "copy":
            assert state["accepted"] == state["drafted"] > 0


@pytest.mark.parametrize("draft_with", ["none", "ngram", "copy"])
@pytest.mark.parametrize(("total_blocks", "max_num_seqs"), [(18, 8), (24, 3), (40, 1)])
def test_preempted_requests_continue_as_if_nothing_had_happened(
    draft_with: str, total_blocks: int, max_num_seqs: int
) -> None:
    served = engine("llama", draft_with, limits(total_blocks=total_blocks, max_num_seqs=max_num_seqs))
    _serve(served, [(4, 20)], "llama")
    if total_blocks == 18:
        assert served.state.totals[0]["preemptions"] > 0


@pytest.mark.parametrize("block_size", [1, 3, 16, 48])
def test_any_block_size_gives_the_same_tokens(block_size: int) -> None:
    _serve(engine("llama", "copy", limits(total_blocks=512 // block_size, block_size=block_size)), [(3, 16)], "llama")


def test_float32_gives_the_same_tokens_here() -> None:
    bounds = limits()
    _serve(TorchEngine(paged(tiny("llama"), bounds, exact=False), bounds), [(0, 16)], "llama")


def test_exact_logits_do_not_depend_on_the_rest_of_the_batch() -> None:
    """Bit for bit: alone, or among others of other lengths and numbers of new tokens."""
    bounds = limits()
    target = paged(tiny("llama"), bounds)
    served = TorchEngine(target, bounds)
    for prompt in prompts((12, 31, 5, 20)):
        served.submit(prompt, 8)
    served.step(0, 4096)
    table = served.table
    seats = served.table.seat_of[:4]
    lengths = served.state.requests["computed"][:4].astype(np.int64)
    counts = np.array([1, 3, 1, 7])
    starts = lengths - counts
    together = target.forward(table, seats, starts, counts, counts).numpy()
    first = 0
    for i, count in enumerate(counts):
        alone = target.forward(table, seats[i : i + 1], starts[i : i + 1], counts[i : i + 1], counts[i : i + 1])
        np.testing.assert_array_equal(together[first : first + count], alone.numpy())
        first += count
