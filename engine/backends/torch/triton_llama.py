"""Forward pass of Llama-family models on a GPU: library matrix products, and a kernel for each part between them.

A batch of decodes is bound by the launches of a few hundred small kernels and by their memory traffic beside the
weights. Here a layer is four products and five or six kernels, and small batches are replayed as CUDA graphs. A
forward's inputs come in one copy, and chosen tokens stay on the device until they are read (`Promises`). `PagedModel`
checks the result against the plain model when it loads.
"""

from __future__ import annotations

import importlib.util
from typing import Any, ClassVar

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor

from engine.backends.torch.attention import LayerShape, Pool
from engine.backends.torch.compiled import STATIC_ROPE
from engine.backends.torch.fused import FusedLlama, fuse
from engine.backends.torch.graphs import Graphs
from engine.backends.torch.layout import Inputs, Layout, Staging, write
from engine.backends.torch.promises import Promises
from engine.backends.torch.table import CacheTable
from engine.speculation.tree import Branches

GRAPH_ROWS = (1, 2, 4, 8, *range(16, 64, 8), *range(64, 128, 16), *range(128, 256, 32), *range(256, 513, 64))
"""Rows of graphs: a batch is filled up to the next of these; one of more rows than the last is launched as it is."""

_SMALL_TILE, _LARGE_TILE = 16, 64
"""Query rows of an attention program in a graph, and elsewhere."""

_MOST_SPLITS = 16
_PROGRAMS_A_PROCESSOR = 2
"""Keys are split among programs up to this many programs per multiprocessor."""

_INTERPRETED_PROCESSORS = 2

_PROMISED = 1 << 19
"""Capacity for one iteration's choices: 4,096 requests, each with the largest tree grown and verified."""


class TritonLlama:
    """The forward of a model for which `supports` holds; see `FusedLlama` about its weights."""

    interpreted: ClassVar[bool] = False
    """True if Triton interprets kernels on a CPU (TRITON_INTERPRET=1 before it is imported): for tests."""

    def __init__(self, model: Any, shapes: list[LayerShape]) -> None:
        from engine.backends.torch import triton_kernels

        self._kernels = triton_kernels
        self._eps: float = model.config.rms_norm_eps
        self._rotary = model.model.rotary_emb
        self._embedding, self._norm, self._head = model.model.embed_tokens, model.model.norm, model.lm_head
        self._layers = [fuse(layer, shape) for layer, shape in zip(model.model.layers, shapes, strict=True)]
        shape = shapes[0]
        self._heads, self._kv_heads, self._width = self._layers[0].heads, shape.kv_heads, shape.key_width
        self._scale = shape.key_width**-0.5 if shape.scale is None else shape.scale
        self._device: torch.device = model.device
        self._processors = _INTERPRETED_PROCESSORS
        if self._device.type == "cuda":
            self._processors = torch.cuda.get_device_properties(self._device).multi_processor_count
        self.graphs = Graphs(self._device)
        self.promises = Promises(_PROMISED, self._device)
        self.codes = np.zeros(0, dtype=np.int64)
        """(rows,) the latest forward's choices, by the negative ids of `Promises`."""
        self._pool: Pool | None = None
        # Made for a cache and a table by `_follow`.
        self._layout: Layout
        self._memory: Tensor
        self._staging: Staging
        self._cos = self._sin = torch.zeros(0, self._width // 2, device=self._device)

    @staticmethod
    def supports(model: Any, shapes: list[LayerShape]) -> bool:
        """Return True for a model of the family of `FusedLlama`, on a GPU, not in float64, with identical layers."""
        if not FusedLlama.supports(model, shapes) or importlib.util.find_spec("triton") is None:
            return False
        if model.device.type != "cuda" and not TritonLlama.interpreted:
            return False
        shape = shapes[0]
        width = shape.key_width
        alike = len(set(shapes)) == 1 and width == shape.value_width and shape.window is None
        rope = getattr(model.model.rotary_emb, "rope_type", None)
        return alike and width in (16, 32, 64, 128, 256) and rope in STATIC_ROPE and model.dtype != torch.float64

    def __call__(
        self,
        pool: Pool,
        table: CacheTable,
        seats: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        keep: NDArray[np.int64],
        branches: Branches | None = None,
    ) -> Tensor:
        """As `PagedModel.forward`; the logits are overwritten by the next forward."""
        self._follow(pool, table)
        rows, wanted = int(counts.sum()), int(keep.sum())
        promised = self.promises.make(wanted)
        self.codes = -1 - promised
        size = next((size for size in GRAPH_ROWS if size >= rows), None)
        tile_rows = self._tile_rows(_LARGE_TILE if size is None else _SMALL_TILE)
        tiles = int((-(-counts // tile_rows)).sum())
        splits, trees = self._splits(tiles), branches is not None
        batch = table, seats, starts, counts, keep, promised, self.promises.spare, tile_rows, branches
        if size is None:
            layout = Layout(rows, wanted, tiles, len(seats), table.blocks.shape[1])
            host = torch.empty(layout.size, dtype=torch.int32, pin_memory=self._device.type == "cuda")
            write(layout.cut(host.numpy(), np.int64), *batch)
            with torch.inference_mode():
                inputs = layout.cut(host.to(self._device, non_blocking=True), torch.int64)
                return self._forward(inputs, trees, splits, tile_rows)
        host, written = self._staged(size)
        write(written, *batch)
        return self._run(host, size, splits, trees)[:wanted]

    def top(self, logits: Tensor, count: int) -> NDArray[np.int64]:
        """(rows, count) tokens of the highest of the latest forward's logits, falling, by the ids of `Promises`.

        They are read at once where they do not fit into the buffer of deferred tokens.
        """
        if count == 1:
            return self.codes[:, None]
        best = logits.topk(count, dim=-1).indices
        if best.numel() > self.promises.left // 2:
            found: NDArray[np.int64] = best.cpu().numpy()
            return found
        entries = self.promises.make(best.numel())
        if len(entries):
            with torch.inference_mode():
                self.promises.values[entries[0] : entries[-1] + 1].copy_(best.view(-1))
        return -1 - entries.reshape(-1, count)

    def finite(self) -> NDArray[np.bool_]:
        """(rows,) True where the highest of the latest forward's logits are finite; known with its choices."""
        return self.promises.finite(self.codes)

    def prepare(self, pool: Pool, table: CacheTable, trees: bool) -> None:
        """Compile all kernels, and capture every graph that batches over such a table come to need.

        Done by forwards of dummy rows, which are cached in scratch. Parts that only trees need are done on request.
        """
        self._follow(pool, table)
        nobody = np.zeros(0, dtype=np.int64)
        tile_rows = self._tile_rows(_LARGE_TILE)
        layout = Layout(1, 0, 1, 1, table.blocks.shape[1])
        host = torch.empty(layout.size, dtype=torch.int32)
        spare = self.promises.spare
        write(layout.cut(host.numpy(), np.int64), table, *(nobody,) * 5, spare, tile_rows, None)
        inputs = layout.cut(host.to(self._device), torch.int64)
        with torch.inference_mode():
            for power in range(_MOST_SPLITS.bit_length()):
                for branched in (False, True) if trees else (False,):
                    self._forward(inputs, branched, 1 << power, tile_rows)
        tile_rows = self._tile_rows(_SMALL_TILE)
        for size in reversed(GRAPH_ROWS):
            tiles = range(-(-size // tile_rows), min(size, self._layout.requests) + 1)
            for splits in {self._splits(count) for count in tiles}:
                for branched in (False, True) if trees else (False,):
                    host, written = self._staged(size)
                    write(written, table, *(nobody,) * 5, spare, tile_rows, None)
                    self._run(host, size, splits, branched)

    def join(self, promises: Promises) -> None:
        """Share another model's buffer of deferred tokens, so that both are read at once."""
        self.promises = promises
        # The next forward rebuilds what belonged to the old one.
        self._pool = None

    def _follow(self, pool: Pool, table: CacheTable) -> None:
        """Prepare for another cache, or a table of another size."""
        seats, blocks = table.blocks.shape
        most = Layout(GRAPH_ROWS[-1], GRAPH_ROWS[-1], GRAPH_ROWS[-1], seats, blocks)
        if pool is self._pool and most == self._layout:
            return
        self.graphs.forget()
        self._pool, self._layout = pool, most
        self._memory = torch.zeros(most.size, dtype=torch.int32, device=self._device)
        self._staging = Staging(most, self._device, self.promises)
        positions = blocks * table.block_size
        if positions > len(self._cos):
            with torch.inference_mode():
                at = torch.arange(positions, device=self._device)[None]
                cos, sin = self._rotary(torch.zeros(1, device=self._device), at)
            half = self._width // 2
            self._cos, self._sin = (part[0, :, :half].contiguous() for part in (cos, sin))

    def _splits(self, tiles: int) -> int:
        """Programs that share a tile's keys: few tiles leave most of the GPU idle otherwise."""
        splits = 1
        while splits < _MOST_SPLITS and tiles * self._kv_heads * splits < _PROGRAMS_A_PROCESSOR * self._processors:
            splits *= 2
        return splits

    def _staged(self, size: int) -> tuple[Tensor, Inputs]:
        """Host memory for a graph's inputs, and its parts for `size` rows."""
        host = self._staging.next()
        return host.memory, host.parts(size, self._most_tiles(size))

    def _inputs(self, size: int) -> Inputs:
        """The parts of the device's memory that the graph of `size` rows reads."""
        return self._layout.cut(self._memory, torch.int64).first(size, self._most_tiles(size))

    def _most_tiles(self, size: int) -> int:
        """Tiles that a graph has room for: a request has at most one that is not full."""
        return min(size, self._layout.requests + size // self._tile_rows(_SMALL_TILE))

    def _tile_rows(self, query_rows: int) -> int:
        """Tokens of a tile: query heads that share keys are rows of their own."""
        return max(1, query_rows * self._kv_heads // self._heads)

    def _run(self, host: Tensor, size: int, splits: int, trees: bool) -> Tensor:
        """Logits of as many rows as the graph has, for inputs that were written to `host`."""
        with torch.inference_mode():
            self._memory.copy_(host, non_blocking=True)
            return self.graphs.run(
                (size, splits, trees),
                lambda: self._forward(self._inputs(size), trees, splits, self._tile_rows(_SMALL_TILE)),
            )

    def _forward(self, inputs: Inputs, trees: bool, splits: int, tile_rows: int) -> Tensor:
        """Logits of the rows in `inputs.kept`; their argmax is stored among the deferred tokens."""
        assert self._pool is not None
        kernels, pool, heads, rows = self._kernels, self._pool, self._heads, len(inputs.ids)
        bits = inputs.bits if trees else None
        hidden = kernels.embed(inputs.ids, self.promises.values, self._embedding.weight)
        added = None
        for layer, keys, values in zip(self._layers, pool.keys, pool.values, strict=True):
            normed = kernels.normalise(hidden, added, layer.norm, self._eps)
            qkv = F.linear(normed, layer.qkv, layer.qkv_bias).view(rows, -1, self._width)
            where = (inputs.positions, inputs.slots, keys, values, heads, self._kv_heads, pool.block_size)
            kernels.turn_and_cache(qkv, self._cos, self._sin, *where)
            found = kernels.paged_attention(
                qkv[:, :heads], keys, values, inputs.tiles, inputs.blocks, inputs.prefix, bits, self._scale,
                pool.block_size, self._kv_heads, tile_rows=tile_rows, splits=splits,
            )  # fmt: skip
            added = F.linear(found.view(rows, -1), layer.out, layer.out_bias)
            normed = kernels.normalise(hidden, added, layer.mlp_norm, self._eps)
            active = kernels.activate(F.linear(normed, layer.gate_up, layer.gate_up_bias))
            added = F.linear(active, layer.down, layer.down_bias)
        normed = kernels.normalise(hidden, added, self._norm.weight, self._eps)
        normed = normed.index_select(0, inputs.kept)
        logits = F.linear(normed, self._head.weight, self._head.bias)
        if len(logits):
            highest, choices = logits.max(-1)
            self.promises.values.index_copy_(0, inputs.entries, choices)
            self.promises.logits.index_copy_(0, inputs.entries, highest.float())
        return logits
