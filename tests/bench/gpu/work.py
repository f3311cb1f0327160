"""What an iteration must do at least: bytes that it reads and products that it computes, counted from a model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Work:
    """A causal language model's costs, counted from its weights.

    body_bytes, body_parameters: of everything between the embedding and the output projection; head_bytes,
    head_parameters: the output projection's; row_bytes: one token's row of the embedding table, of which no more is
    read; kv_bytes_per_token: keys and values of one cached token; attention_width: heads x width of one, all layers.
    """

    body_bytes: int
    body_parameters: int
    head_bytes: int
    head_parameters: int
    row_bytes: int
    kv_bytes_per_token: int
    attention_width: int

    @classmethod
    def of(cls, model: Any, kv_bytes_per_token: int) -> Work:
        """Counted from a `transformers` model. Matrices (not norms or biases) count as multiplied parameters."""
        embedding, head = model.get_input_embeddings().weight, model.get_output_embeddings().weight
        apart = {id(embedding), id(head)}
        body = [parameter for parameter in model.parameters() if id(parameter) not in apart]
        config = model.config.get_text_config()
        width = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
        return cls(
            body_bytes=sum(parameter.numel() * parameter.element_size() for parameter in body),
            body_parameters=sum(parameter.numel() for parameter in body if parameter.ndim > 1),
            head_bytes=head.numel() * head.element_size(),
            head_parameters=head.numel(),
            row_bytes=embedding.shape[1] * embedding.element_size(),
            kv_bytes_per_token=kv_bytes_per_token,
            attention_width=config.num_hidden_layers * config.num_attention_heads * width,
        )

    def bytes_read(self, tokens: int, kv_tokens: float) -> float:
        """Bytes that a forward of `tokens` new tokens over `kv_tokens` cached ones cannot do without reading."""
        return self.body_bytes + self.head_bytes + tokens * self.row_bytes + kv_tokens * self.kv_bytes_per_token

    def prefill_flop(self, tokens: int, rows: int = 1) -> float:
        """Floating-point operations of a prompt's `tokens` from an empty cache, logits for the last `rows` of them.

        Two a parameter and token in the products; attention counts the pairs that a causal mask lets through, four a
        pair and channel (scores, and the weighted sum of values).
        """
        products = 2 * (tokens * self.body_parameters + rows * self.head_parameters)
        return products + 4 * self.attention_width * tokens * (tokens + 1) / 2
