"""Forward pass of Llama-family models on a CPU in float32: numpy and compiled functions from token ids to logits.

A small model's forward on CPU is a few hundred tensor operations of a few microseconds each, with as much overhead
between them. Here matrix products call BLAS, or a kernel where they have few rows, on weights in the layout that both
read fastest. Everything between two products is one compiled function, and attention reads keys and values in place in
the cache. `PagedModel` checks the result against the plain model when it loads.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray

from engine.backends.torch import kernels
from engine.backends.torch.attention import LayerShape, Pool
from engine.backends.torch.fused import FusedLlama
from engine.backends.torch.table import CacheTable
from engine.speculation.tree import Branches

STATIC_ROPE = ("default", "linear", "llama3", "yarn")
"""Kinds of rotary embedding whose angles depend on the position alone."""

_FEW_ROWS = 8
"""Up to this many rows are multiplied with weights by `kernels.times`; a single one is BLAS's matrix-vector product."""

_ENDLESS = 1 << 62

_NO_TREES = np.zeros(0, dtype=np.int64), *(np.zeros((0, 0), dtype=np.int32),) * 2


class _Linear(NamedTuple):
    """A linear map as a matrix (inputs, outputs), the order in which few rows are multiplied fastest, and its bias."""

    matrix: NDArray[np.float32]
    bias: NDArray[np.float32] | None

    def __call__(self, rows: NDArray[np.float32], out: NDArray[np.float32]) -> None:
        if 1 < len(rows) <= _FEW_ROWS:
            kernels.times(rows, self.matrix, out)
        else:
            np.dot(rows, self.matrix, out=out)
        if self.bias is not None:
            out += self.bias


class _Layer(NamedTuple):
    norm: NDArray[np.float32]
    qkv: _Linear
    out: _Linear
    mlp_norm: NDArray[np.float32]
    gate_up: _Linear
    down: _Linear
    scale: np.float32
    window: int


class _Work(NamedTuple):
    """Memory of one forward's intermediate values, reused by the next; (T, ...) except for attention's own."""

    hidden: NDArray[np.float32]
    normed: NDArray[np.float32]
    added: NDArray[np.float32]
    qkv: NDArray[np.float32]
    attended: NDArray[np.float32]
    gate_up: NDArray[np.float32]
    active: NDArray[np.float32]
    attention: tuple[NDArray[np.float32], ...]


class CompiledLlama:
    """The forward of a model for which `supports` holds, in place of its modules.

    The model's own projections become views of the matrices used here, so that weights are in memory once. Where input
    embedding and output projection are tied, a transposed copy of the latter is kept as well.
    """

    def __init__(self, model: Any, shapes: list[LayerShape]) -> None:
        body = model.model
        self._rotary = body.rotary_emb
        self._eps = np.float32(model.config.rms_norm_eps)
        self._layers = [_compile(layer, shape) for layer, shape in zip(body.layers, shapes, strict=True)]
        self._embedding: NDArray[np.float32] = body.embed_tokens.weight.detach().numpy()
        self._norm: NDArray[np.float32] = body.norm.weight.detach().numpy()
        head = model.lm_head.weight.detach().t().contiguous()
        if model.lm_head.weight is not body.embed_tokens.weight:
            model.lm_head.weight.data = head.t()
        self._head = _Linear(head.numpy(), None if model.lm_head.bias is None else model.lm_head.bias.detach().numpy())
        self._width = shapes[0].key_width
        self._repeat = model.config.num_attention_heads // shapes[0].kv_heads
        self._pool: Pool | None = None
        self._caches: list[tuple[NDArray[np.float32], NDArray[np.float32]]] = []
        self._rows, self._seen = 0, 0
        self._cos = self._sin = np.zeros((0, self._width), dtype=np.float32)
        self._work = self._memory(16, 256)

    @staticmethod
    def supports(model: Any, shapes: list[LayerShape]) -> bool:
        """Return True for a model of the family of `FusedLlama`, on CPU, in float32, with identical layers."""
        if not FusedLlama.supports(model, shapes) or model.device.type != "cpu" or model.dtype != torch.float32:
            return False
        alike = {(shape.kv_heads, shape.key_width, shape.value_width) for shape in shapes}
        rope = getattr(model.model.rotary_emb, "rope_type", None)
        return len(alike) == 1 and shapes[0].key_width == shapes[0].value_width and rope in STATIC_ROPE

    def __call__(
        self,
        pool: Pool,
        table: CacheTable,
        seats: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        keep: NDArray[np.int64],
        branches: Branches | None = None,
    ) -> torch.Tensor:
        """As `PagedModel.forward`."""
        rows, seen, kept = int(counts.sum()), int((starts + counts).max()) + pool.block_size, int(keep.sum())
        if rows > self._rows or seen > self._seen:
            self._work = self._memory(rows, seen)
        if pool is not self._pool:
            self._pool, self._caches = (
                pool,
                [self._view(*pair, pool) for pair in zip(pool.keys, pool.values, strict=True)],
            )
        hidden, normed, added, qkv, attended, gate_up, active = (part[:rows] for part in self._work[:-1])
        kernels.embed(self._embedding, table.tokens, seats, starts, counts, hidden)
        added[:] = 0.0
        trees = _NO_TREES if branches is None else tuple(np.ascontiguousarray(part) for part in branches)
        where = table.blocks, seats, starts, counts, trees
        angles, room, eps = (self._cos, self._sin), self._work.attention, self._eps
        for layer, (keys, values) in zip(self._layers, self._caches, strict=True):
            kernels.add_and_normalise(hidden, added, layer.norm, eps, normed)
            layer.qkv(normed, qkv)
            kernels.attend(qkv, attended, *where, keys, values, *angles, layer.window, layer.scale, *room)
            layer.out(attended, added)
            kernels.add_and_normalise(hidden, added, layer.mlp_norm, eps, normed)
            layer.gate_up(normed, gate_up)
            kernels.gate(gate_up, active)
            layer.down(active, added)
        kernels.finish(hidden, added, self._norm, eps, counts, keep, normed)
        logits = np.empty((kept, self._head.matrix.shape[1]), dtype=np.float32)
        if kept > 0:
            self._head(normed[:kept], logits)
        return torch.from_numpy(logits)

    def _view(self, keys: torch.Tensor, values: torch.Tensor, pool: Pool) -> tuple[Any, Any]:
        """A layer's keys and values, each (blocks, kv heads, block size, width)."""
        shape = pool.num_blocks, -1, pool.block_size, self._width
        return keys.view(shape).numpy(), values.view(shape).numpy()

    def _memory(self, rows: int, seen: int) -> _Work:
        """Memory for `rows` tokens that see up to `seen` positions; grows by half, so that memory is touched once."""
        if rows > self._rows:
            self._rows = rows + rows // 2
        if seen > self._seen:
            self._seen = seen + seen // 2
            with torch.inference_mode():
                cos, sin = self._rotary(torch.zeros(1), torch.arange(self._seen)[None])
            self._cos, self._sin = cos[0].numpy(), sin[0].numpy()
        layer, lines = self._layers[0], max(kernels.TILE_ROWS, self._repeat)

        def room(width: int) -> NDArray[np.float32]:
            return np.zeros((self._rows, width), dtype=np.float32)

        return _Work(
            hidden=room(len(layer.norm)),
            normed=room(len(layer.norm)),
            added=room(len(layer.norm)),
            qkv=room(layer.qkv.matrix.shape[1]),
            attended=room(layer.out.matrix.shape[0]),
            gate_up=room(layer.gate_up.matrix.shape[1]),
            active=room(layer.down.matrix.shape[0]),
            attention=(
                np.zeros(lines * self._seen, dtype=np.float32),
                np.zeros(2 * self._seen * self._width, dtype=np.float32),
                np.zeros(2 * lines * self._width, dtype=np.float32),
            ),
        )


def _compile(layer: Any, shape: LayerShape) -> _Layer:
    attention, mlp = layer.self_attn, layer.mlp
    return _Layer(
        norm=layer.input_layernorm.weight.detach().numpy(),
        qkv=_joined(attention.q_proj, attention.k_proj, attention.v_proj),
        out=_joined(attention.o_proj),
        mlp_norm=layer.post_attention_layernorm.weight.detach().numpy(),
        gate_up=_joined(mlp.gate_proj, mlp.up_proj),
        down=_joined(mlp.down_proj),
        scale=np.float32(shape.key_width**-0.5 if shape.scale is None else shape.scale),
        window=_ENDLESS if shape.window is None else shape.window,
    )


def _joined(*parts: Any) -> _Linear:
    """Linear maps side by side; their own weights become views of the result."""
    whole = torch.cat([part.weight.detach() for part in parts]).t().contiguous()
    for part, view in zip(parts, whole.t().split([part.out_features for part in parts]), strict=True):
        part.weight.data = view
    bias = None if parts[0].bias is None else torch.cat([part.bias.detach() for part in parts]).numpy()
    return _Linear(whole.numpy(), bias)
