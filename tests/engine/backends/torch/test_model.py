"""A model is taken only if its attention goes through the paged cache and comes out unchanged."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import transformers

from engine.backends.torch.model import PagedModel, UnsupportedModelError
from engine.backends.torch.pack import Group
from engine.backends.torch.table import CacheTable
from tests.engine.backends.torch.models import LAYERS, VOCABULARY, exact, limits, model, paged


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
    model("llama").save_pretrained(tmp_path)
    bounds = limits()
    loaded = PagedModel.load(tmp_path, CacheTable(bounds).num_blocks, bounds.block_size)
    for name, weight in model("llama").state_dict().items():
        assert torch.equal(loaded.model.state_dict()[name], weight)


def test_the_callers_model_stays_as_it_was() -> None:
    source = model("llama")
    before = source.config._attn_implementation
    paged(source, limits())
    assert source.dtype == torch.float32
    assert source.config._attn_implementation == before
    assert exact("llama").dtype == torch.float64


def test_bfloat16_passes_its_own_tolerance() -> None:
    source = transformers.AutoModelForCausalLM.from_config(model("llama").config).bfloat16()
    assert paged(source, limits(), exact=False).dtype == torch.bfloat16
