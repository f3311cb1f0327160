"""A model is taken only if its attention goes through the paged cache and comes out unchanged."""

from __future__ import annotations

import copy
from pathlib import Path

import numpy as np
import pytest
import torch
import transformers

from engine.backends.torch.fused import FusedLlama
from engine.backends.torch.model import PagedModel, UnsupportedModelError
from engine.backends.torch.pack import Group
from engine.backends.torch.table import CacheTable
from tests.engine.backends.torch.models import LAYERS, VOCABULARY, limits, model, paged


def test_models_outside_the_attention_interface_are_refused_with_the_count() -> None:
    bloom = transformers.BloomForCausalLM(
        transformers.BloomConfig(vocab_size=VOCABULARY, hidden_size=32, n_layer=LAYERS, n_head=4)
    )
    with pytest.raises(UnsupportedModelError, match=f"BloomForCausalLM: 0 of {LAYERS} layers"):
        paged(bloom, limits(), exact=False)


def test_a_model_that_the_cache_would_change_is_refused_with_the_difference(monkeypatch: pytest.MonkeyPatch) -> None:
    """Here by masks that ignore the sliding window of its layers."""
    mask = Group.mask
    monkeypatch.setattr(
        Group, "mask", lambda self, repeat, window, least_rows, dtype: mask(self, repeat, None, least_rows, dtype)
    )
    with pytest.raises(UnsupportedModelError, match="differ from a plain forward's"):
        paged(model("mistral_window"), limits())


def test_loading_a_folder_gives_the_model_that_was_saved(tmp_path: Path) -> None:
    source = transformers.AutoModelForCausalLM.from_config(model("llama").config)
    source.save_pretrained(tmp_path)
    bounds = limits()
    loaded = PagedModel.load(tmp_path, CacheTable(bounds).num_blocks, bounds.block_size)
    for name, weight in source.state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight)


def test_the_callers_model_stays_as_it_was() -> None:
    source = model("llama")
    before = source.config._attn_implementation
    paged(source, limits())
    assert source.dtype == torch.float32
    assert source.config._attn_implementation == before


def test_bfloat16_passes_its_own_tolerance() -> None:
    source = transformers.AutoModelForCausalLM.from_config(model("llama").config).bfloat16()
    assert paged(source, limits(), exact=False).dtype == torch.bfloat16


@pytest.mark.parametrize("kind", ["llama", "qwen2", "mistral_window"])
def test_the_fused_way_is_taken_and_gives_the_plain_logits(kind: str) -> None:
    """In float64 to rounding; other models go through their own modules."""
    bounds = limits()
    fused, plain = (
        PagedModel(model(kind), CacheTable(bounds).num_blocks, 4, fused=f, exact=True) for f in (True, False)
    )
    assert fused.fused is not None
    assert plain.fused is None
    table = CacheTable(bounds)
    table.tokens[:2, :20] = np.random.default_rng(0).integers(0, VOCABULARY, (2, 20))
    table.blocks[:2] = np.arange(2 * table.blocks.shape[1]).reshape(2, -1) % bounds.total_blocks
    batch = np.array([0, 1]), np.array([0, 0]), np.array([20, 9]), np.array([20, 1])
    torch.testing.assert_close(fused.forward(table, *batch), plain.forward(table, *batch), rtol=0, atol=1e-9)


@pytest.mark.parametrize("fused", [True, False])
def test_layers_with_configurations_of_their_own_are_reached(fused: bool) -> None:
    source = transformers.AutoModelForCausalLM.from_config(model("llama").config)
    source.model.layers[1] = copy.deepcopy(source.model.layers[1])
    assert source.model.layers[1].self_attn.config is not source.config
    bounds = limits()
    made = PagedModel(source, CacheTable(bounds).num_blocks, bounds.block_size, fused=fused)
    assert (made.fused is not None) == fused


def test_models_outside_the_family_are_not_fused() -> None:
    assert paged(model("gpt2"), limits()).fused is None


def test_fusing_leaves_the_weights_as_they_were_and_holds_them_once() -> None:
    source = transformers.AutoModelForCausalLM.from_config(model("qwen2").config)
    before = {name: weight.clone() for name, weight in source.state_dict().items()}
    paged(source, limits(), exact=False)
    for name, weight in source.state_dict().items():
        assert torch.equal(weight, before[name]), name
    attention = source.model.layers[0].self_attn
    assert attention.q_proj.weight.untyped_storage().data_ptr() == attention.v_proj.weight.untyped_storage().data_ptr()


def test_a_family_member_that_fusing_changes_runs_plain(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(FusedLlama, "_norm", lambda self, hidden, weight: hidden * weight)
    assert paged(model("llama"), limits()).fused is None
