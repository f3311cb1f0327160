"""A faster forward pass of Llama-family models: fused projections, `F.rms_norm`, and no module calls in between.

With few tokens per forward, most of a small model's time on CPU is Python and small kernels around the products. The
computation is the same, and `PagedModel` checks it against the plain model when it loads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import torch.nn.functional as F  # noqa: N812
from torch import Tensor, nn

from engine.backends.torch.attention import LayerShape, Step

FAMILY = ("LlamaForCausalLM", "MistralForCausalLM", "Qwen2ForCausalLM")


class FusedLayer(NamedTuple):
    """Fused weights of one layer: queries, keys and values in one matrix, gate and up in another."""

    shape: LayerShape
    heads: int
    norm: Tensor
    qkv: Tensor
    qkv_bias: Tensor | None
    out: Tensor
    out_bias: Tensor | None
    mlp_norm: Tensor
    gate_up: Tensor
    gate_up_bias: Tensor | None
    down: Tensor
    down_bias: Tensor | None


class FusedLlama:
    """The forward of a model for which `supports` holds.

    The model's own projections become views of the fused weights, so the weights are in memory once.
    """

    def __init__(self, model: Any, shapes: list[LayerShape]) -> None:
        self._eps: float = model.config.rms_norm_eps
        self._body, self._head = model.model, model.lm_head
        self._layers = [fuse(layer, shape) for layer, shape in zip(model.model.layers, shapes, strict=True)]

    @staticmethod
    def supports(model: Any, shapes: list[LayerShape]) -> bool:
        """Return True for an unquantised model of the family with the usual activation."""
        if type(model).__name__ not in FAMILY or model.config.hidden_act not in ("silu", "swish"):
            return False
        layer = model.model.layers[0]
        return all(type(part) is nn.Linear for part in (layer.self_attn.q_proj, layer.mlp.gate_proj, model.lm_head))

    def __call__(self, ids: Tensor, positions: Tensor, rows: Tensor, step: Step) -> Tensor:
        """Logits (rows, V) of the packed tokens `ids` (1, T) at `positions` (1, T), attending through `step`."""
        hidden = F.embedding(ids[0], self._body.embed_tokens.weight)
        cos, sin = (part[0, :, None] for part in self._body.rotary_emb(hidden[None], positions))
        for layer in self._layers:
            hidden = hidden + self._attention(layer, self._norm(hidden, layer.norm), cos, sin, step)
            both = F.linear(self._norm(hidden, layer.mlp_norm), layer.gate_up, layer.gate_up_bias)
            gate, up = both.chunk(2, dim=-1)
            hidden = hidden + F.linear(F.silu(gate).mul_(up), layer.down, layer.down_bias)
        return F.linear(self._norm(hidden[rows], self._body.norm.weight), self._head.weight, self._head.bias)

    def _norm(self, hidden: Tensor, weight: Tensor) -> Tensor:
        if hidden.dtype == torch.float32:
            return F.rms_norm(hidden, weight.shape, weight, self._eps)
        # The family normalises in float32 whatever the model's type, and scales in the model's.
        return weight * F.rms_norm(hidden.float(), weight.shape, None, self._eps).to(hidden.dtype)

    def _attention(self, layer: FusedLayer, hidden: Tensor, cos: Tensor, sin: Tensor, step: Step) -> Tensor:
        shape, heads, width = layer.shape, layer.heads, layer.shape.key_width
        qkv = F.linear(hidden, layer.qkv, layer.qkv_bias).view(len(hidden), -1, width)
        turned, value = qkv[:, : heads + shape.kv_heads], qkv[:, heads + shape.kv_heads :]
        first, second = turned.chunk(2, dim=-1)
        turned = (turned * cos).add_(torch.cat((-second, first), dim=-1).mul_(sin))
        query, key = turned[:, :heads], turned[:, heads:]
        query, key, value = (part.transpose(0, 1)[None] for part in (query, key, value))
        found = step.attend(query, key, value, shape.scale, {"sliding_window": shape.window})
        return F.linear(found.view(len(hidden), -1), layer.out, layer.out_bias)


def fuse(layer: Any, shape: LayerShape) -> FusedLayer:
    """A layer of the family with joined projections; the layer's own become views of them."""
    attention, mlp = layer.self_attn, layer.mlp
    qkv, qkv_bias = _joined(attention.q_proj, attention.k_proj, attention.v_proj)
    gate_up, gate_up_bias = _joined(mlp.gate_proj, mlp.up_proj)
    return FusedLayer(
        shape=shape,
        heads=attention.q_proj.out_features // shape.key_width,
        norm=layer.input_layernorm.weight,
        qkv=qkv,
        qkv_bias=qkv_bias,
        out=attention.o_proj.weight,
        out_bias=attention.o_proj.bias,
        mlp_norm=layer.post_attention_layernorm.weight,
        gate_up=gate_up,
        gate_up_bias=gate_up_bias,
        down=mlp.down_proj.weight,
        down_bias=mlp.down_proj.bias,
    )


def _joined(*parts: Any) -> tuple[Tensor, Tensor | None]:
    """Joined weights and biases of linear maps; the maps' own become views of them."""
    joined: list[Tensor | None] = []
    for name in ("weight", "bias"):
        own = [getattr(part, name) for part in parts]
        if own[0] is None:
            joined.append(None)
            continue
        whole = torch.cat([parameter.data for parameter in own])
        for parameter, view in zip(own, whole.split([len(parameter) for parameter in own]), strict=True):
            parameter.data = view
        joined.append(whole)
    weight, bias = joined
    assert weight is not None
    return weight, bias
