"""Published model architectures by name, for speed measurements of engines whose text does not matter."""

from __future__ import annotations

from typing import Any, NamedTuple

PREFIX = "shape:"
"""In place of a folder or a hub id: a shape's name follows, and its weights are random (`engine.models.bigram`)."""


class Shape(NamedTuple):
    """A Llama of one key and value head a query head, its embedding and output projection apart."""

    hidden: int
    intermediate: int
    layers: int
    heads: int
    vocabulary: int = 32_000


SHAPES: dict[str, Shape] = {
    # config.json of lmsys/vicuna-7b-v1.3, -13b-v1.3 and -33b-v1.3, which are LLaMA-1's (Touvron et al., 2023, table 2).
    "vicuna_7b": Shape(4096, 11008, 32, 32),
    "vicuna_13b": Shape(5120, 13824, 40, 40),
    "vicuna_33b": Shape(6656, 17920, 60, 52),
    # config.json of JackFram/llama-68m and llama-160m (Miao et al., SpecInfer, ASPLOS'24).
    "llama_68m": Shape(768, 3072, 2, 12),
    "llama_160m": Shape(768, 3072, 12, 12),
    # Not a published model: a small pair for quick runs.
    "mini": Shape(512, 768, 2, 4, vocabulary=4096),
    "mini_draft": Shape(512, 512, 1, 4, vocabulary=4096),
}

CONTEXT = 2048
"""Context length of all published shapes."""


def shape_named(source: str) -> Shape | None:
    """The shape that `source` names; None: it names a model of another kind. Raises ValueError for an unknown name."""
    if not source.startswith(PREFIX):
        return None
    name = source.removeprefix(PREFIX)
    if name not in SHAPES:
        raise ValueError(f"{source}: no such shape; choose one of {', '.join(PREFIX + name for name in SHAPES)}")
    return SHAPES[name]


def llama_config(shape: Shape, positions: int = CONTEXT, layers: int | None = None) -> Any:
    """The `transformers` configuration of a shape.

    Args:
        shape: a published architecture.
        positions: most tokens of a sequence; the model is made for `CONTEXT` if that is more. Angles of its rotary
            embedding depend on the position alone.
        layers: in place of the shape's own number.
    """
    from transformers import LlamaConfig

    return LlamaConfig(
        vocab_size=shape.vocabulary,
        hidden_size=shape.hidden,
        intermediate_size=shape.intermediate,
        num_hidden_layers=layers or shape.layers,
        num_attention_heads=shape.heads,
        num_key_value_heads=shape.heads,
        max_position_embeddings=max(CONTEXT, positions),
        rms_norm_eps=1e-6,
        tie_word_embeddings=False,
    )


def shape_tokenizer(shape: Shape) -> Any:
    """The embedded tokenizer with the shape's vocabulary: further ids are words such as `<2048>`."""
    from engine.models.load import load_tokenizer

    tokenizer = load_tokenizer()
    tokenizer.add_tokens([f"<{token}>" for token in range(len(tokenizer), shape.vocabulary)])
    return tokenizer
