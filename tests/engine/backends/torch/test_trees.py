"""Candidate trees under every allocation leave greedy outputs as they are, and are really used."""

from __future__ import annotations

from functools import partial

import numpy as np
import pytest
import torch

from engine.backends.torch.engine import TorchEngine
from engine.backends.torch.table import CacheTable
from engine.speculation.allocation import Speculation
from engine.speculation.tree import Branches
from tests.engine.backends.torch.models import (
    assert_generates_as_target,
    engine,
    exact,
    limits,
    model,
    near,
    paged,
    prompts,
)
from tests.engine.backends.torch.models import drafter as drafter_of
from tests.engine.core.cases import Figures

LENGTHS = (3, 30, 17, 9, 1)
MAX_TOKENS = 20

_serve = partial(assert_generates_as_target, lengths=LENGTHS, max_tokens=MAX_TOKENS)


class Watched(TorchEngine):
    """Counts what its trees were used for."""

    left_first_branch = 0

    def _compact(self, planned, paths) -> None:  # type: ignore[no-untyped-def]
        accepted = self.state.accepted[0, : planned.decodes]
        column = np.arange(paths.shape[1])
        taken = (column < accepted[:, None]) & (paths != column)
        self.left_first_branch += int(taken.any(axis=1).sum())
        super()._compact(planned, paths)


def _engine(kind: str, draft_with: str, how: Speculation, **bounds: int) -> Watched:
    room = limits(**bounds)
    return Watched(paged(model(kind), room), room, drafter_of(draft_with, kind, room), how)


WAYS = [Speculation(a, b) for a in ("uniform", "local", "global") for b in (1, 2, 3)]


@pytest.mark.parametrize("how", WAYS, ids=lambda how: f"{how.allocation}-{how.branching}")
@pytest.mark.parametrize("draft_with", ["ngram", "near", "model"])
def test_every_allocation_and_branching_generates_what_the_target_alone_does(how: Speculation, draft_with: str) -> None:
    """With c from 0 to 8 in turn and chunks of many sizes, so that drafters have to catch up and batches are mixed."""
    served = _engine("llama", draft_with, how)
    _serve(served, [(4, 16), (8, 5), (1, 64), (0, 7), (6, 16), (2, 3), (7, 16), (3, 1), (5, 2048)], "llama")
    state = Figures(served.state)
    assert state["drafted"] > 0
    if draft_with != "model":
        assert state["accepted"] > 0
    if draft_with == "near" and how.branching > 1:
        assert served.left_first_branch > 0, "a second choice was right and was used"
    if how.branching == 1:
        assert served.left_first_branch == 0


@pytest.mark.parametrize("how", WAYS, ids=lambda how: f"{how.allocation}-{how.branching}")
@pytest.mark.parametrize("kind", ["gpt2", "mistral_window"])
def test_other_families_and_windows_see_positions_by_depth(how: Speculation, kind: str) -> None:
    served = _engine(kind, "near", how)
    _serve(served, [(5, 16), (8, 16)], kind)
    assert served.state.totals["accepted"][0] > 0
    if how.branching > 1:
        assert served.left_first_branch > 0


@pytest.mark.parametrize("candidates", range(9))
@pytest.mark.parametrize("allocation", ["uniform", "local", "global"])
def test_any_number_of_candidates_gives_the_same_tokens(allocation: str, candidates: int) -> None:
    served = _engine("llama", "near", Speculation(allocation, branching=2))  # type: ignore[arg-type]
    _serve(served, [(candidates, 64)], "llama")
    state = Figures(served.state)
    assert (state["drafted"] > 0) == (candidates > 0)
    assert state["drafted"] <= candidates * state["decode_steps"]


@pytest.mark.parametrize("draft_depth", [1, 2, 6])
def test_no_accepted_path_is_longer_than_the_draft_is_deep(draft_depth: int) -> None:
    for allocation in ("uniform", "local", "global"):
        for branching in (1, 3):
            served = _engine("llama", "copy", Speculation(allocation, branching, draft_depth))  # type: ignore[arg-type]
            observation = served.new_observation()
            _serve(served, [(5, 64)], "llama")
            served.observe(observation)
            deepest = int(np.flatnonzero(observation.accepted[0]).max()) + 1
            assert deepest <= draft_depth
            if branching == 1:
                assert deepest == (draft_depth if allocation == "global" else min(draft_depth, 5))


@pytest.mark.parametrize("how", WAYS[::2], ids=lambda how: f"{how.allocation}-{how.branching}")
def test_preempted_requests_continue_as_if_nothing_had_happened(how: Speculation) -> None:
    served = _engine("llama", "near", how, total_blocks=14)
    _serve(served, [(6, 20)], "llama")
    assert served.state.totals["preemptions"][0] > 0


def test_global_allocation_gives_some_requests_more_than_c() -> None:
    """Beyond the planned tokens and into blocks that were not planned for."""
    served = _engine("llama", "near", Speculation("global", 1), block_size=2, total_blocks=128)
    most = 0
    for i, prompt in enumerate(prompts(LENGTHS)):
        served.submit(prompt, MAX_TOKENS - i % 3)
    while served.step(3, 64):
        decodes = int(served.state.batches["num_decodes"][0])
        tokens = served.state.batch_tokens[0, :decodes]
        assert tokens.sum() <= 4 * decodes
        most = max(most, int(tokens.max(initial=0)))
    assert most > 4


def test_a_copy_of_the_target_is_always_right_along_its_first_branch() -> None:
    """Local trees of a drafter with the target's weights accept a token a level: the trees are drafted right."""
    served = _engine("llama", "copy", Speculation("local", 3))
    _serve(served, [(6, 2048)], "llama")
    observation = served.new_observation()
    served.observe(observation)
    np.testing.assert_array_equal(observation.accepted, observation.drafted)


@pytest.mark.parametrize("allocation", ["uniform", "local", "global"])
def test_float32_trees_give_the_same_tokens_here(allocation: str) -> None:
    bounds = limits()
    how = Speculation(allocation, 3)  # type: ignore[arg-type]
    drafter = drafter_of("near", "llama", bounds)
    _serve(TorchEngine(paged(model("llama"), bounds, exact=False), bounds, drafter, how), [(6, 16)], "llama")


@pytest.mark.parametrize("kind", ["llama", "gpt2", "mistral_window"])
def test_a_branch_sees_its_ancestors_and_no_other_branch(kind: str) -> None:
    """Logits after every node are those of the plain model after the text along its path."""
    bounds = limits(total_blocks=40)
    target = paged(model(kind), bounds)
    random = np.random.default_rng(3)
    table = CacheTable(bounds)
    table.blocks[:2, :10] = random.permutation(20).reshape(2, 10)
    parents = np.array([[-1, -1, 0, 1, 0, 3, 2, 6], [-1, 0, 1, 1, 3, 2, 0, 0]], dtype=np.int32)
    depths = np.zeros_like(parents)
    for node in range(parents.shape[1]):
        above = parents[:, node]
        depths[:, node] = 1 + np.where(above < 0, 0, depths[np.arange(2), above])
    lengths, nodes = np.array([13, 5]), np.array([8, 6])
    texts = random.integers(0, 40, (2, 30))
    for seat in range(2):
        table.tokens[seat, :30] = texts[seat]
    seats = np.arange(2)
    target.forward(table, seats, np.zeros(2, dtype=np.int64), lengths - 1, np.zeros(2, dtype=np.int64))
    branches = Branches(lengths - 1, parents, depths)
    logits = target.forward(table, seats, lengths - 1, 1 + nodes, 1 + nodes, branches)
    row = 0
    for seat in range(2):
        for node in range(-1, int(nodes[seat])):
            path, at = [], node
            while at >= 0:
                path.append(int(texts[seat, lengths[seat] + at]))
                at = int(parents[seat, at])
            text = [*texts[seat, : lengths[seat]].tolist(), *path[::-1]]
            with torch.inference_mode():
                plain = exact(kind)(input_ids=torch.tensor([text]), use_cache=False).logits[0, -1]
            torch.testing.assert_close(logits[row], plain, rtol=0, atol=1e-9)
            row += 1


def test_moving_what_is_cached_makes_a_path_plain_text() -> None:
    bounds = limits(total_blocks=40)
    target = paged(model("llama"), bounds)
    table = CacheTable(bounds)
    table.blocks[0, :8] = np.random.default_rng(0).permutation(8)
    text = np.random.default_rng(1).integers(0, 40, 12)
    one, zero = np.ones(1, dtype=np.int64), np.zeros(1, dtype=np.int64)
    table.tokens[0, :12] = text
    parents = np.array([[-1, -1, 1, 0, 2]], dtype=np.int32)
    depths = np.array([[1, 1, 2, 2, 3]], dtype=np.int32)
    target.forward(table, zero, zero, 6 * one, zero, None)
    target.forward(table, zero, 6 * one, 6 * one, one, Branches(6 * one, parents, depths))
    path = np.array([1, 2, 4])
    target.move(table, np.zeros(3, dtype=np.int64), 7 + path, 7 + np.arange(3))
    follow = [*text[:7].tolist(), *text[7 + path].tolist(), 5]
    table.tokens[0, : len(follow)] = follow
    with torch.inference_mode():
        plain = exact("llama")(input_ids=torch.tensor([follow]), use_cache=False).logits[0, -1]
    torch.testing.assert_close(target.forward(table, zero, 10 * one, one, one)[0], plain, rtol=0, atol=1e-9)


def test_seconds_of_drafter_and_target_are_told_apart() -> None:
    served = engine("llama", "near", limits(), Speculation("global", 2))
    served.submit([1, 2, 3], 8)
    served.step(3, 8)
    assert served.draft_s == 0.0 < served.forward_s
    served.step(3, 8)
    assert served.draft_s > 0.0
    assert served.draft_s + served.forward_s < served.state.batches["elapsed"][0]


def test_noise_makes_another_model() -> None:
    assert not torch.equal(near("llama").lm_head.weight, model("llama").lm_head.weight)
