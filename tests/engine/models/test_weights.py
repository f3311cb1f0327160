"""The models that come with the package: what they are, and that they draft as their page says."""

import json

import numpy as np
import pytest
import torch

from engine.models.corpus import held_out_prompts
from engine.models.heldout import conditional_acceptance, drafter_agreement, greedy_continuations, token_losses
from engine.models.load import DRAFTER_FOLDER, TARGET_FOLDER, WEIGHTS, deepen, load_drafter, load_target, load_tokenizer


@pytest.fixture(scope="module")
def target():
    return load_target()


@pytest.fixture(scope="module")
def drafter():
    return load_drafter()


@pytest.fixture(scope="module")
def prompts():
    cut = held_out_prompts(load_tokenizer(), [96] * 8, seed=1)
    return torch.from_numpy(np.stack([prompt.tokens for prompt in cut])).long()


def test_the_models_are_of_the_sizes_that_they_are_said_to_be(target, drafter):
    assert 4.5e6 < sum(p.numel() for p in target.parameters()) < 5.5e6
    assert 0.5e6 < sum(p.numel() for p in drafter.parameters()) < 0.7e6
    assert target.config.vocab_size == drafter.config.vocab_size == len(load_tokenizer()) == 2048
    assert target.dtype == torch.float32
    assert load_drafter(torch.bfloat16).dtype == torch.bfloat16
    assert not target.training


def test_both_folders_carry_the_same_tokenizer():
    assert (TARGET_FOLDER / "tokenizer.json").read_bytes() == (DRAFTER_FOLDER / "tokenizer.json").read_bytes()
    assert load_tokenizer().eos_token_id == load_target().config.eos_token_id == 0


def test_all_files_together_stay_small():
    assert sum(path.stat().st_size for path in WEIGHTS.rglob("*") if path.is_file()) < 12.5e6


def test_a_folder_without_weights_says_how_to_make_them(monkeypatch, tmp_path):
    monkeypatch.setattr("engine.models.load.TARGET_FOLDER", tmp_path / "target")
    with pytest.raises(FileNotFoundError, match=r"no weights here.*python -m engine\.models\.train --out"):
        load_target()


@pytest.mark.parametrize("layers", [6, 13, 24])
def test_a_deepened_target_has_bit_equal_logits(target, prompts, layers):
    deep = deepen(target, layers)
    assert deep.config.num_hidden_layers == len(deep.model.layers) == layers
    assert len(target.model.layers) == 6
    with torch.no_grad():
        assert torch.equal(deep(prompts).logits, target(prompts).logits)


def test_a_deepened_target_decodes_the_same_with_its_own_cache(target, prompts):
    assert torch.equal(
        greedy_continuations(deepen(target), prompts[:2], 12), greedy_continuations(target, prompts[:2], 12)
    )


def test_added_layers_compute_with_the_weights_that_they_copy(target):
    deep = deepen(target, 24)
    own, added = deep.model.layers[0], deep.model.layers[1]
    assert [layer.self_attn.layer_idx for layer in deep.model.layers] == list(range(24))
    assert torch.equal(own.self_attn.q_proj.weight, added.self_attn.q_proj.weight)
    assert torch.equal(own.mlp.up_proj.weight, added.mlp.up_proj.weight)
    assert not added.self_attn.o_proj.weight.any()
    assert not added.mlp.down_proj.weight.any()


def test_a_target_cannot_be_deepened_to_fewer_layers(target):
    with pytest.raises(ValueError, match="layers=5: the model has 6 layers already"):
        deepen(target, 5)


def test_the_drafter_agrees_with_the_target_on_held_out_prompts(target, drafter, prompts):
    texts = greedy_continuations(target, prompts, 48)
    acceptance, tokens_a_step = conditional_acceptance(drafter_agreement(drafter, texts, 96), drafted=6)
    assert acceptance[0] > 0.4
    assert tokens_a_step > 1.5


def test_the_models_know_held_out_text_as_well_as_the_page_says(target, drafter, prompts):
    figures = json.loads((WEIGHTS / "heldout.json").read_text())
    for name, model in (("target", target), ("drafter", drafter)):
        assert float(token_losses(model, prompts).mean()) == pytest.approx(figures[f"{name}_loss"], abs=0.6)
    assert figures["target_loss"] < figures["drafter_loss"]
