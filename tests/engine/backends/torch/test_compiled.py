"""The compiled way through Llama-family models gives the logits of the model's own modules."""

from __future__ import annotations

import copy

import numpy as np
import pytest
import transformers
from hypothesis import given, settings
from hypothesis import strategies as st

from engine.backends.torch import kernels
from engine.backends.torch.compiled import CompiledLlama
from engine.backends.torch.engine import TorchEngine
from engine.backends.torch.model import PagedModel
from engine.backends.torch.table import CacheTable
from engine.speculation.ngram import NgramDrafter
from tests.engine.backends.torch.models import VOCABULARY, generated, limits, model, prompts, trees

KINDS = ("llama", "qwen2", "mistral_window")


def _pair(kind: str, block_size: int) -> tuple[PagedModel, PagedModel]:
    """The compiled way and the modules' own, biases included where the kind has them."""
    bounds = limits(total_blocks=1024 // block_size, block_size=block_size)
    source = copy.deepcopy(model(kind))
    for layer in source.model.layers:
        if layer.self_attn.q_proj.bias is not None:
            layer.self_attn.q_proj.bias.data.normal_()
    made = [
        PagedModel(copy.deepcopy(source), CacheTable(bounds).num_blocks, block_size, fused=fused)
        for fused in (True, False)
    ]
    assert isinstance(made[0].fused, CompiledLlama)
    assert made[1].fused is None
    return made[0], made[1]


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("block_size", [3, 4, 16])
def test_any_batch_gives_the_modules_logits(kind: str, block_size: int) -> None:
    """Chunks, single tokens and candidates of many requests at once, in forwards of one row and of hundreds."""
    pair = _pair(kind, block_size)
    random = np.random.default_rng(block_size)
    table = CacheTable(limits(total_blocks=1024 // block_size, block_size=block_size))
    table.tokens[:] = random.integers(0, VOCABULARY, table.tokens.shape)
    blocks = random.permutation(1024 // block_size)
    each = len(blocks) // 8
    table.blocks[:8, :each] = blocks[: 8 * each].reshape(8, each)
    starts = np.zeros(8, dtype=np.int64)
    for most in (1, 40, 1, 1, 5, 30, 1, 9):
        seats = random.permutation(8)[: random.integers(1, 9)]
        counts = random.integers(1, most + 1, len(seats))
        keep = random.integers(0, counts + 1)
        got, expected = (one.forward(table, seats, starts[seats], counts, keep) for one in pair)
        np.testing.assert_allclose(got.numpy(), expected.numpy(), atol=1e-4)
        starts[seats] += counts


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("nodes", [4, 16])
def test_tree_nodes_see_their_ancestors_only(kind: str, nodes: int) -> None:
    """Few nodes attend by block, many by product; roots differ, and one request has a chain."""
    pair = _pair(kind, 4)
    random = np.random.default_rng(nodes)
    table = CacheTable(limits(total_blocks=256))
    table.tokens[:] = random.integers(0, VOCABULARY, table.tokens.shape)
    table.blocks[:3] = np.arange(3 * table.blocks.shape[1]).reshape(3, -1)
    seats, roots = np.arange(3), np.array([12, 5, 30])
    for one in pair:
        one.forward(table, seats, 0 * roots, roots, 0 * roots)
    counts, branches = np.full(3, 1 + nodes), trees(roots, nodes, random)
    got, expected = (one.forward(table, seats, roots, counts, counts, branches) for one in pair)
    np.testing.assert_allclose(got.numpy(), expected.numpy(), atol=1e-4)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("candidates", [0, 1, 4, 8])
@pytest.mark.parametrize("token_budget", [5, 200])
def test_float32_gives_the_tokens_of_generate_here(kind: str, candidates: int, token_budget: int) -> None:
    bounds = limits(total_blocks=40)
    target = PagedModel(copy.deepcopy(model(kind)), CacheTable(bounds).num_blocks, bounds.block_size)
    served = TorchEngine(target, bounds, NgramDrafter())
    asked = prompts((3, 10, 30, 17, 44, 5, 9, 1))
    numbers = [served.submit(prompt, 16) for prompt in asked]
    served.run(candidates, token_budget)
    for number, prompt in zip(numbers, asked, strict=True):
        assert served.output(number) == generated(kind, prompt, 16)


@settings(max_examples=60, deadline=None)
@given(st.integers(1, 11), st.integers(1, 23), st.sampled_from([1, 7, 64, 1023, 1025, 2500]))
def test_products_of_few_rows_are_products(rows: int, inputs: int, outputs: int) -> None:
    random = np.random.default_rng(0)
    left = random.standard_normal((rows, inputs)).astype(np.float32)
    right = random.standard_normal((inputs, outputs)).astype(np.float32)
    out = np.full((rows, outputs), np.nan, dtype=np.float32)
    kernels.times(left, right, out)
    np.testing.assert_allclose(out, left @ right, atol=1e-4)


def test_gating_is_exact_to_rounding_over_the_whole_range() -> None:
    gates = np.concatenate((np.linspace(-200, 200, 4001), [-1e4, 1e4, 0.0])).astype(np.float32)
    ups = np.ones_like(gates)
    out = np.empty((1, len(gates)), dtype=np.float32)
    kernels.gate(np.concatenate((gates, ups))[None], out)
    exact = gates.astype(np.float64) / (1.0 + np.exp(-np.clip(gates.astype(np.float64), -700, None)))
    np.testing.assert_allclose(out[0], exact, rtol=5e-7, atol=1e-30)


def test_models_that_it_does_not_know_are_left_to_the_others() -> None:
    bounds = limits()
    half = transformers.AutoModelForCausalLM.from_config(model("llama").config).bfloat16()
    blocks = CacheTable(bounds).num_blocks
    assert not isinstance(PagedModel(half, blocks, 4).fused, CompiledLlama)
    assert PagedModel(model("gpt2"), blocks, 4).fused is None
