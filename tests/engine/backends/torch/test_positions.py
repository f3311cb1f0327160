"""An engine that could pass the end of a table of positions is refused; rotary positions go on, with a warning."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import pytest
import transformers

from engine.backends.torch.config import TorchEngineConfig
from engine.backends.torch.positions import PositionsError, check_positions
from engine.limits import EngineLimits
from tests.engine.backends.torch import models

POSITIONS = 64
SMALL = {"vocab_size": 40, "hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 4}
TABLES: dict[str, Any] = {
    "gpt2": lambda: transformers.GPT2Config(vocab_size=40, n_embd=32, n_layer=1, n_head=4, n_positions=POSITIONS),
    "opt": lambda: transformers.OPTConfig(
        **SMALL, ffn_dim=48, word_embed_proj_dim=32, max_position_embeddings=POSITIONS
    ),
    "gpt_neo": lambda: transformers.GPTNeoConfig(
        vocab_size=40, hidden_size=32, num_layers=1, num_heads=4, attention_types=[[["global"], 1]],
        max_position_embeddings=POSITIONS,
    ),
    "bigcode": lambda: transformers.GPTBigCodeConfig(
        vocab_size=40, n_embd=32, n_layer=1, n_head=4, n_positions=POSITIONS
    ),
    "gptj": lambda: transformers.GPTJConfig(
        vocab_size=40, n_embd=32, n_layer=1, n_head=4, rotary_dim=4, n_positions=POSITIONS
    ),
}  # fmt: skip


def limits(longest: int, blocks: int = 64) -> EngineLimits:
    return EngineLimits(blocks, 4, 0, 4, longest)


@pytest.mark.parametrize("kind", TABLES)
def test_a_table_bounds_the_longest_request(kind: str) -> None:
    model = transformers.AutoModelForCausalLM.from_config(TABLES[kind]())
    check_positions(model, limits(POSITIONS), kind)
    check_positions(model, limits(1000, blocks=POSITIONS // 4), kind)
    with pytest.raises(PositionsError, match=rf"max_model_len=65: {kind} has a table of 64 .* set max_model_len=64 "):
        check_positions(model, limits(POSITIONS + 1), kind)


def test_rotary_positions_are_warned_of(caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        check_positions(models.model("llama"), limits(models.POSITIONS), "llama")
        assert not caplog.messages
        check_positions(models.model("llama"), limits(models.POSITIONS + 1, blocks=100), "llama")
    assert caplog.messages == [
        "max_model_len=257: llama was made for 256 positions, and what it says past them may be worth little"
    ]


def test_an_engine_is_refused_before_it_serves(tmp_path: Path) -> None:
    models.model("gpt2").save_pretrained(tmp_path)
    config = TorchEngineConfig(name="gpt2", target=str(tmp_path), drafter="none", max_num_seqs=2)
    with pytest.raises(PositionsError, match="set max_model_len=256"):
        config.build(ttft_target=1.0)
    engine = config.model_copy(update={"max_model_len": 256}).build(ttft_target=1.0)
    number = engine.submit([1] * 250, 6)
    engine.run(0, 512)
    assert len(engine.output(number)) == 6
