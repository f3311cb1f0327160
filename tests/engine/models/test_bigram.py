"""Random weights say what their tables say: one cycle, and a drafter that agrees as often as planned and knows when."""

from __future__ import annotations

from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.typing import NDArray
from transformers import AutoModelForCausalLM

from engine.backends.torch.acceptance import NOT_PROPOSED, agreement, speculate
from engine.backends.torch.config import TorchEngineConfig
from engine.backends.torch.engine import TorchEngine
from engine.models.bigram import (
    PROPOSED,
    SPECIAL_TOKENS,
    Table,
    bigram_drafter,
    bigram_target,
    drafter_table,
    logits_of,
    target_table,
)
from engine.models.shapes import SHAPES, llama_config
from engine.speculation.allocation import Speculation
from engine.workload.markov import DRAFTERS, MarkovChain, fitted
from engine.workload.workload import run_lengths

CPU = torch.device("cpu")
VOCABULARY = SHAPES["mini"].vocabulary
LAW = fitted("draft68m")
SEED = 3


@cache
def target(dtype: torch.dtype = torch.float32, seed: int = SEED) -> Any:
    return bigram_target(llama_config(SHAPES["mini"]), seed, dtype=dtype, device=CPU)


@cache
def drafter(dtype: torch.dtype = torch.float32, seed: int = SEED) -> Any:
    return bigram_drafter(llama_config(SHAPES["mini_draft"]), seed, LAW, dtype=dtype, device=CPU)


@cache
def planned(seed: int = SEED) -> Table:
    return drafter_table(VOCABULARY, seed, LAW)


@cache
def engine() -> TorchEngine:
    return TorchEngineConfig(
        name="mini", target="shape:mini", drafter_model="shape:mini_draft", weights_seed=SEED, device="cpu",
        max_num_seqs=8, max_model_len=256, num_kv_blocks=128,
    ).build(ttft_target=1.0)  # fmt: skip


TEXT = np.random.default_rng(0).permutation(VOCABULARY)[:768]
"""Tokens of the text that models are shown."""


def logits_along_text(model: Any) -> torch.Tensor:
    """(768, V) after each token of `TEXT`."""
    with torch.inference_mode():
        logits: torch.Tensor = model(input_ids=torch.from_numpy(TEXT)[None]).logits[0].float()
    return logits


def continued(prompt: NDArray[np.int32], tokens: int) -> list[int]:
    """What the target's table says after a prompt."""
    successor, text = planned().successor, [int(prompt[-1])]
    for _ in range(tokens):
        text.append(int(successor[text[-1]]))
    return text[1:]


def prompts(count: int) -> list[NDArray[np.int32]]:
    random = np.random.default_rng(1)
    return [random.integers(0, VOCABULARY, 5 + 3 * i).astype(np.int32) for i in range(count)]


@given(st.integers(16, 400), st.integers(0, 2**32))
@settings(deadline=None)
def test_the_text_is_one_cycle_through_all_but_the_special_tokens(vocabulary: int, seed: int) -> None:
    successor = target_table(vocabulary, seed).successor
    seen, token = set(), 0
    while (token := int(successor[token])) not in seen:
        seen.add(token)
    assert seen == set(range(SPECIAL_TOKENS, vocabulary))


@given(st.integers(64, 3000), st.integers(0, 2**32), st.floats(0.05, 0.95))
@settings(deadline=None)
def test_a_drafter_ranks_different_tokens_by_falling_probability(vocabulary: int, seed: int, alpha: float) -> None:
    table = drafter_table(vocabulary, seed, MarkovChain(base_mean=alpha))
    np.testing.assert_array_equal(table.successor, target_table(vocabulary, seed).successor)
    assert (np.diff(np.sort(table.proposals, axis=1), axis=1) > 0).all()
    assert (table.proposals >= SPECIAL_TOKENS).all()
    assert (np.diff(table.probabilities, axis=1) < 0).all()
    assert (table.probabilities > 0).all()
    assert (table.probabilities.sum(axis=1) < 1).all()
    found = table.proposals == table.successor[:, None]
    np.testing.assert_array_equal(np.where(found.any(axis=1), found.argmax(axis=1), PROPOSED), table.rank)


def tokens_an_iteration(run_length: NDArray[np.uint8], candidates: int) -> float:
    """Of drafts of a constant length along the positions."""
    position = steps = 0
    while position < len(run_length):
        position += 1 + min(candidates, int(run_length[position]))
        steps += 1
    return position / steps


@pytest.mark.parametrize("law", DRAFTERS.values(), ids=DRAFTERS)
def test_agreement_along_the_cycle_has_the_law(law: MarkovChain) -> None:
    """Of positions one after the other, so runs are as long; a draft of 8 tells them from a coin's."""
    table = drafter_table(32_000, SEED, law)
    token, ranks = SPECIAL_TOKENS, np.empty(32_000 - SPECIAL_TOKENS, dtype=np.uint8)
    for place in range(len(ranks)):
        ranks[place] = table.rank[token]
        token = int(table.successor[token])
    runs = run_lengths(ranks, np.array([0, len(ranks)]))
    other = law.draw(SEED + 1, np.arange(2000), np.full(2000, 256, dtype=np.int32))
    assert (ranks == 0).mean() == pytest.approx(law.mean_agreement, abs=0.02)
    for candidates in (1, 3, 8):
        expected = tokens_an_iteration(other.run_length, candidates)
        assert tokens_an_iteration(runs, candidates) == pytest.approx(expected, rel=0.04)


def test_a_planned_candidate_is_right_as_often_as_it_is_probable() -> None:
    table = drafter_table(32_000, SEED, LAW)
    for k in range(PROPOSED):
        probability, right = table.probabilities[:, k], table.rank == k
        for low, high in zip(np.linspace(0, 0.9, 10), np.linspace(0.1, 1.0, 10), strict=True):
            inside = (probability >= low) & (probability < high)
            if inside.sum() > 200:
                expected = probability[inside].mean()
                spread = np.sqrt(expected * (1 - expected) / inside.sum())
                # The law's confidences themselves are calibrated to .02.
                assert abs(right[inside].mean() - expected) < 0.02 + 4 * spread


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_target_chooses_its_successor_by_far(dtype: torch.dtype) -> None:
    logits = logits_along_text(target(dtype))
    best = logits.topk(2)
    np.testing.assert_array_equal(best.indices[:, 0].numpy(), planned().successor[TEXT])
    steps_of_bfloat16 = (best.values[:, 0] - best.values[:, 1]) / (best.values[:, 0] * torch.finfo(torch.bfloat16).eps)
    assert float(steps_of_bfloat16.min()) > 20
    assert float(best.values[:, 0].max()) < 20 * float(logits.std()), "no rounding is much of the logits' spread"


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_the_drafters_probabilities_are_the_planned_ones(dtype: torch.dtype) -> None:
    table, logits = planned(), logits_along_text(drafter(dtype))
    proposals, probabilities = table.proposals[TEXT], table.probabilities[TEXT]
    measured = np.take_along_axis(logits.softmax(-1).numpy(), proposals, axis=1)
    # What is left to all other tokens differs by what 512 dimensions let through; a logit of bfloat16 is rounded too.
    np.testing.assert_allclose(measured, probabilities, rtol=0.15 if dtype == torch.float32 else 0.2)
    np.testing.assert_allclose(measured.mean(axis=0), probabilities.mean(axis=0), rtol=0.03)
    order = logits.topk(PROPOSED).indices.numpy()
    assert ((order == proposals).mean(axis=0) > [0.995, 0.99, 0.98, 0.97]).all()


def test_weights_are_a_function_of_the_seed() -> None:
    for made, again, other in (
        (target(), target.__wrapped__(), target(seed=SEED + 1)),
        (drafter(), drafter.__wrapped__(), drafter(seed=SEED + 1)),
    ):
        mine, same, others = (model.state_dict() for model in (made, again, other))
        assert all(torch.equal(mine[name], same[name]) for name in mine)
        assert not any(torch.equal(mine[name], others[name]) for name in mine if mine[name].dim() == 2)
    assert not torch.equal(target().model.embed_tokens.weight, drafter().model.embed_tokens.weight)


def test_models_are_made_in_their_type_and_say_where_they_are_in_a_text() -> None:
    model = target(torch.bfloat16)
    assert {weight.dtype for weight in model.parameters()} == {torch.bfloat16}
    usual = AutoModelForCausalLM.from_config(model.config)
    for name, angles in usual.named_buffers():
        torch.testing.assert_close(dict(model.named_buffers())[name], angles, rtol=0, atol=0)


def test_every_matrix_is_random_and_the_hidden_state_is_the_embedding() -> None:
    model = target()
    for name, weight in model.named_parameters():
        if weight.dim() == 2:
            assert (weight == 0).float().mean() < 1e-3, name
            assert len(weight.unique()) > 0.9 * min(weight.numel(), 2**20), name
    text = torch.arange(200)
    with torch.inference_mode():
        hidden = model.model(input_ids=text[None]).last_hidden_state[0]
        alone = model.model.norm(model.model.embed_tokens(text))
    assert 0 < float((hidden - alone).abs().max()) < 0.01


def test_too_few_dimensions_for_the_vocabulary_are_refused() -> None:
    with pytest.raises(ValueError, match="16 dimensions are too few to tell 4096 tokens apart"):
        logits_of(planned(), 16, 0.5)


@pytest.mark.parametrize(
    ("candidates", "how"),
    [
        (0, Speculation()),
        (4, Speculation()),
        (4, Speculation("uniform", 3)),
        (4, Speculation("local", 4)),
        (4, Speculation("global", 4)),
    ],
    ids=str,
)
def test_outputs_are_the_targets_text_however_candidates_are_spent(candidates: int, how: Speculation) -> None:
    served, given = engine(), prompts(8)
    served.speculation = how
    found = speculate(served, given, 48, candidates, 64)
    assert found.outputs == [continued(prompt, 48) for prompt in given]
    assert (found.tokens_per_iteration > 1.5) == (candidates > 0)


@pytest.mark.parametrize("candidates", [1, 3, 8])
def test_chains_are_accepted_as_the_table_says(candidates: int) -> None:
    served, given, most = engine(), prompts(8), 200
    served.speculation = Speculation()
    found = speculate(served, given, most, candidates, 64)
    agrees = planned().rank == 0
    emitted = steps = 0
    for output in found.outputs:
        place = 1
        while place < most:
            room, accepted = min(candidates, most - place - 1), 0
            while accepted < room and agrees[output[place - 1 + accepted]]:
                accepted += 1
            place, emitted, steps = place + accepted + 1, emitted + accepted + 1, steps + 1
    assert found.tokens_per_iteration == pytest.approx(emitted / steps, rel=1e-9)


def test_the_engine_finds_the_planned_ranks_and_confidence() -> None:
    served, given = engine(), prompts(8)
    outputs = [continued(prompt, 200) for prompt in given]
    found = agreement(served, given, outputs)
    before = [prompt[-1:].tolist() + output[:-1] for prompt, output in zip(given, outputs, strict=True)]
    table, tokens = planned(), np.concatenate(before)
    np.testing.assert_array_equal(found["rank"] == 0, table.rank[tokens] == 0)
    assert (np.minimum(found["rank"], PROPOSED) == table.rank[tokens]).mean() > 0.99
    assert NOT_PROPOSED in found["rank"]
    np.testing.assert_allclose(found["confidence"], table.probabilities[tokens, 0], rtol=0.02, atol=0.02)
    for low, high in ((0.0, 0.3), (0.3, 0.6), (0.6, 0.9), (0.9, 1.0)):
        inside = (found["confidence"] >= low) & (found["confidence"] < high)
        right = (found["rank"][inside] == 0).mean()
        assert right == pytest.approx(found["confidence"][inside].mean(), abs=4 * 0.5 / np.sqrt(inside.sum()))
