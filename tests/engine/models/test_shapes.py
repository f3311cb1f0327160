"""Shapes are the published architectures, and their ids have a spelling each."""

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from transformers import AutoModelForCausalLM

from engine.models.load import load_tokenizer
from engine.models.shapes import SHAPES, llama_config, shape_named, shape_tokenizer


@pytest.mark.parametrize(
    ("name", "parameters"),
    [
        ("vicuna_7b", 6_738_415_616),
        ("vicuna_13b", 13_015_864_320),
        ("vicuna_33b", 32_528_943_616),
        ("llama_68m", 68_030_208),
        ("llama_160m", 162_417_408),
    ],
)
def test_a_shape_has_as_many_parameters_as_the_published_model(name: str, parameters: int) -> None:
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(llama_config(SHAPES[name]))
    assert sum(weight.numel() for weight in model.parameters()) == parameters
    assert model.lm_head.weight is not model.model.embed_tokens.weight


def test_a_shape_is_made_for_its_own_context_or_a_longer_one() -> None:
    shape = SHAPES["vicuna_7b"]
    assert llama_config(shape).max_position_embeddings == 2048
    assert llama_config(shape, positions=512).max_position_embeddings == 2048
    longer = llama_config(shape, positions=4096)
    assert longer.max_position_embeddings == 4096
    assert longer.rope_parameters["rope_type"] == "default"


def test_a_shape_can_have_another_number_of_layers() -> None:
    assert llama_config(SHAPES["vicuna_33b"]).num_hidden_layers == 60
    assert llama_config(SHAPES["vicuna_33b"], layers=2).num_hidden_layers == 2


def test_only_known_names_are_shapes() -> None:
    assert shape_named("shape:llama_68m") == SHAPES["llama_68m"]
    assert shape_named("embedded") is None
    assert shape_named("lmsys/vicuna-7b-v1.3") is None
    with pytest.raises(ValueError, match=r"shape:vicuna_70b: no such shape.*shape:vicuna_7b, .*shape:llama_160m"):
        shape_named("shape:vicuna_70b")


TOKENIZER = shape_tokenizer(SHAPES["vicuna_7b"])


@given(st.lists(st.integers(0, 31_999), max_size=20))
def test_every_id_is_spelled_and_those_past_the_embedded_vocabulary_read_back(tokens: list[int]) -> None:
    assert len(TOKENIZER) == 32_000
    spelled = TOKENIZER.decode(tokens)
    words = [token for token in tokens if token >= 2048]
    assert [token for token in TOKENIZER(spelled)["input_ids"] if token >= 2048] == words
    assert TOKENIZER.decode(words) == "".join(f"<{word}>" for word in words)


def test_text_has_the_tokens_that_the_embedded_tokenizer_gives_it() -> None:
    text = "def step(self, action: tuple[int, int]) -> None:\n    return self.commit(action) < 12"
    assert TOKENIZER(text)["input_ids"] == load_tokenizer()(text)["input_ids"]
