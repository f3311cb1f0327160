"""Every architecture either generates what `model.generate` does or is refused when it is loaded, with the reason."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import transformers

from engine.backends.torch.engine import TorchEngine
from engine.backends.torch.model import PagedModel, UnsupportedModelError
from engine.backends.torch.table import CacheTable
from engine.speculation.ngram import NgramDrafter
from tests.engine.backends.torch.models import limits, paged, prompts

VOCABULARY = 40
MAX_TOKENS = 8

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 256,
    "initializer_range": 0.3,
    "head_dim": 8,
    "bos_token_id": 0,
    "eos_token_id": 0,
    "pad_token_id": 0,
}
OWN_NAMES = {"vocab_size": VOCABULARY, "initializer_range": 0.3, "bos_token_id": 0, "eos_token_id": 0}
FEW_EXPERTS = {"num_local_experts": 4, "num_experts_per_tok": 2}

SERVED: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("LlamaConfig", COMMON),
    "llama, rotary scaled as in llama 3": (
        "LlamaConfig",
        COMMON
        | {
            "rope_parameters": {
                "rope_type": "llama3",
                "rope_theta": 10000.0,
                "factor": 4.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 16,
            }
        },
    ),
    "mistral, window": ("MistralConfig", COMMON | {"sliding_window": 7}),
    "mixtral": ("MixtralConfig", COMMON | FEW_EXPERTS),
    "qwen2": ("Qwen2Config", COMMON),
    "qwen3": ("Qwen3Config", COMMON),
    "qwen2 mixture": (
        "Qwen2MoeConfig",
        COMMON | {"num_experts": 4, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "gpt2": ("GPT2Config", OWN_NAMES | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "gpt-neox": ("GPTNeoXConfig", COMMON),
    "gpt-bigcode": ("GPTBigCodeConfig", OWN_NAMES | {"n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 256}),
    "phi": ("PhiConfig", COMMON),
    "phi3": ("Phi3Config", COMMON),
    "opt": ("OPTConfig", COMMON | {"ffn_dim": 48, "word_embed_proj_dim": 32, "init_std": 0.3}),
    "gemma": ("GemmaConfig", COMMON),
    "gemma2": ("Gemma2Config", COMMON | {"sliding_window": 7, "attn_logit_softcapping": 2.0}),
    "gemma3": (
        "Gemma3TextConfig",
        COMMON | {"sliding_window": 7, "layer_types": ["sliding_attention", "full_attention"]},
    ),
    "gpt-oss": ("GptOssConfig", COMMON | FEW_EXPERTS | {"sliding_window": 7}),
    "stablelm": ("StableLmConfig", COMMON),
    "starcoder2": ("Starcoder2Config", COMMON),
    "olmo": ("OlmoConfig", COMMON),
    "olmo2": ("Olmo2Config", COMMON),
    "cohere": ("CohereConfig", COMMON),
    "granite": ("GraniteConfig", COMMON),
    "smollm3": ("SmolLM3Config", COMMON),
    "glm": ("GlmConfig", COMMON),
    "nemotron": ("NemotronConfig", COMMON),
    "helium": ("HeliumConfig", COMMON),
    "ernie 4.5": ("Ernie4_5Config", COMMON),
}


DYNAMIC_ROPE = {"rope_type": "dynamic", "rope_theta": 10000.0, "factor": 2.0}
LONG_ROPE = {
    "rope_type": "longrope",
    "rope_theta": 10000.0,
    "short_factor": [1.0] * 4,
    "long_factor": [4.0] * 4,
    "original_max_position_embeddings": 64,
}
REASONS = (
    "layers called transformers' attention interface",
    "does not run with its attention replaced",
    "differ from a plain forward's",
    "in a text of 128 tokens",
    "attention_mask",
)

UNCERTAIN: dict[str, tuple[str, dict[str, Any]]] = {
    "falcon": (
        "FalconConfig",
        {**OWN_NAMES, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4},
    ),
    "falcon, alibi": (
        "FalconConfig",
        {**OWN_NAMES, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "alibi": True},
    ),
    "bloom": ("BloomConfig", {**OWN_NAMES, "hidden_size": 32, "n_layer": 2, "n_head": 4}),
    "mpt": ("MptConfig", {**OWN_NAMES, "d_model": 32, "n_layers": 2, "n_heads": 4}),
    "xglm": (
        "XGLMConfig",
        {**OWN_NAMES, "d_model": 32, "num_layers": 2, "attention_heads": 4, "ffn_dim": 48, "pad_token_id": 0},
    ),
    "gpt-j": ("GPTJConfig", {**OWN_NAMES, "n_embd": 32, "n_layer": 2, "n_head": 4, "rotary_dim": 8}),
    "mamba": ("MambaConfig", {**COMMON, "state_size": 4}),
    "rwkv": ("RwkvConfig", {**COMMON, "attention_hidden_size": 32}),
    "recurrent gemma": ("RecurrentGemmaConfig", {**COMMON, "num_hidden_layers": 3, "lru_width": 32}),
    "llama 4, attention in chunks": (
        "Llama4TextConfig",
        {**COMMON, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 8},
    ),
    "llama 4, chunks longer than the short comparison": (
        "Llama4TextConfig",
        {**COMMON, "intermediate_size_mlp": 48, "num_local_experts": 2, "attention_chunk_size": 64},
    ),
    "doge, masks of its own": ("DogeConfig", {**COMMON, "keep_window_size": 64}),
    "phimoe, a window it does not pass on": ("PhimoeConfig", {**COMMON, **FEW_EXPERTS, "sliding_window": 64}),
}

REFUSED: dict[str, tuple[str, dict[str, Any], str]] = {
    "llama, dynamic rotary": (
        "LlamaConfig",
        {**COMMON, "rope_parameters": DYNAMIC_ROPE},
        r"\(dynamic\) changes past 256 tokens",
    ),
    "phi3, long rotary": (
        "Phi3Config",
        {**COMMON, "original_max_position_embeddings": 64, "rope_parameters": LONG_ROPE},
        r"\(longrope\) changes past 64",
    ),
}


def _made(name: str, values: dict[str, Any]) -> Any:
    torch.manual_seed(0)
    config = getattr(transformers, name)(**values)
    # The grouped product of experts has no float64.
    config._experts_implementation = "eager"
    made = transformers.AutoModelForCausalLM.from_config(config).eval()
    made.generation_config.eos_token_id = None
    made.generation_config.pad_token_id = 0
    return made


def _assert_generates_what_it_does_alone(source: Any, longest: int = 20) -> None:
    bounds = limits()
    target = paged(source, bounds)
    served = TorchEngine(target, bounds, NgramDrafter())
    asked = prompts((longest, 3, 9))
    numbers = [served.submit(prompt, MAX_TOKENS) for prompt in asked]
    served.run(2, 7)
    alone = target.model
    for number, prompt in zip(numbers, asked, strict=True):
        ids = torch.tensor(prompt)[None]
        with torch.inference_mode():
            out = alone.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False)
        assert served.output(number) == out[0, len(prompt) :].tolist()


def _refusal(source: Any) -> str | None:
    try:
        paged(source, limits(), exact=False)
    except UnsupportedModelError as error:
        return str(error)
    return None


@pytest.mark.parametrize("name", SERVED)
def test_served_architectures_generate_what_they_do_alone(name: str) -> None:
    _assert_generates_what_it_does_alone(_made(*SERVED[name]))


@pytest.mark.parametrize("name", UNCERTAIN)
def test_other_architectures_do_too_or_are_refused_with_the_reason(name: str) -> None:
    """Which of the two is up to the installed version of transformers."""
    refusal = _refusal(_made(*UNCERTAIN[name]))
    if refusal is None:
        _assert_generates_what_it_does_alone(_made(*UNCERTAIN[name]), longest=150)
    else:
        assert any(reason in refusal for reason in REASONS), refusal


@pytest.mark.parametrize("name", REFUSED)
def test_a_rotary_embedding_that_changes_within_the_cache_is_refused(name: str) -> None:
    config, values, reason = REFUSED[name]
    with pytest.raises(UnsupportedModelError, match=reason):
        paged(_made(config, values), limits(), exact=False)


def test_a_figure_that_no_request_reaches_refuses_nothing() -> None:
    config, values = UNCERTAIN["llama 4, chunks longer than the short comparison"]
    bounds = limits()
    blocks = CacheTable(bounds).num_blocks
    assert PagedModel(_made(config, values), blocks, bounds.block_size, max_model_len=64).pool.num_blocks == blocks


@pytest.mark.parametrize("window", [64, 100])
def test_windows_longer_than_the_short_comparison_are_served(window: int) -> None:
    source = _made("MistralConfig", COMMON | {"sliding_window": window})
    bounds, prompt = limits(), prompts((150,))[0]
    target = paged(source, bounds)
    served = TorchEngine(target, bounds, NgramDrafter())
    number = served.submit(prompt, MAX_TOKENS)
    served.run(2, 70)
    ids = torch.tensor(prompt)[None]
    with torch.inference_mode():
        out = target.model.generate(
            ids, attention_mask=torch.ones_like(ids), max_new_tokens=MAX_TOKENS, do_sample=False
        )
    assert served.output(number) == out[0, len(prompt) :].tolist()


def test_a_rotary_embedding_that_stretches_is_served_where_it_does_not() -> None:
    source = _made("LlamaConfig", {**COMMON, "rope_parameters": DYNAMIC_ROPE})
    bounds = limits(total_blocks=256 // 4 - 4)
    assert paged(source, bounds).pool.num_blocks * bounds.block_size == 256


@pytest.mark.parametrize("softcap", [0.5, 50.0])
def test_soft_capped_scores_are_not_left_uncapped(softcap: float) -> None:
    """Also where the cap changes too little for the check at load to see."""
    capped, free = (_made("Gemma2Config", {**COMMON, "attn_logit_softcapping": value}) for value in (softcap, None))
    bounds, prompt = limits(), prompts((20,))[0]
    logits = []
    for source in (capped, free):
        target = paged(source, bounds)
        table = CacheTable(bounds)
        table.tokens[0, : len(prompt)] = prompt
        table.blocks[0] = np.arange(table.blocks.shape[1]) % bounds.total_blocks
        one = np.ones(1, dtype=np.int64)
        logits.append(target.forward(table, 0 * one, 0 * one, len(prompt) * one, one))
        ids = torch.tensor(prompt)[None]
        with torch.inference_mode():
            plain = target.model(input_ids=ids).logits[0, -1:]
        torch.testing.assert_close(logits[-1], plain, rtol=0, atol=1e-5)
    assert not torch.allclose(*logits, atol=1e-5)
