"""One layer's attention over a paged cache: a batch to attend with, what it should come to, and how it is timed."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.backends.torch.attention import LayerShape, Pool
from engine.backends.torch.table import CacheTable
from engine.limits import EngineLimits
from engine.speculation.tree import Branches, fixed_shape
from tests.bench.gpu.device import seconds

UNEVEN = 0.25
"""Cached tokens of a batch's requests spread evenly by so much below and above their mean."""


@dataclass(frozen=True)
class Heads:
    """What attention of one layer looks like in a model."""

    heads: int
    kv_heads: int
    width: int


@dataclass(frozen=True)
class Case:
    """A batch: `requests` with about `kv_tokens` cached each, and `rows` new tokens each, a chain or a tree."""

    name: str
    requests: int
    kv_tokens: int
    rows: int
    branching: int = 1


Attend = Callable[[int], Tensor]
"""(T, heads, width) of layer i, rows request by request."""


class PagedBatch:
    """A case in memory: caches of `layers` layers filled with random keys and values, and queries.

    Requests stand in rising order of cached tokens. The same queries serve every layer. Blocks lie in random order, as
    they do after some serving.
    """

    def __init__(
        self,
        case: Case,
        heads: Heads,
        block_size: int,
        layers: int,
        dtype: torch.dtype,
        device: torch.device,
        seed: int = 0,
    ) -> None:
        self.case, self.heads, self.block_size, self.layers = case, heads, block_size, layers
        self.dtype, self.device = dtype, device
        spread = np.linspace(1 - UNEVEN, 1 + UNEVEN, case.requests) if case.requests > 1 else np.ones(1)
        self.starts: NDArray[np.int64] = np.round(case.kv_tokens * spread).astype(np.int64)
        self.ends = self.starts + case.rows
        blocks = -(-self.ends // block_size)
        limits = EngineLimits(int(blocks.sum()), block_size, 0, case.requests, int(self.ends.max()))
        self.table = CacheTable(limits)
        names = np.random.default_rng(seed).permutation(limits.total_blocks)
        for request, (first, count) in enumerate(zip(np.cumsum(blocks) - blocks, blocks, strict=True)):
            self.table.blocks[request, :count] = names[first : first + count]
        torch.manual_seed(seed)
        shape = LayerShape(heads.kv_heads, heads.width, heads.width, None, None)
        self.pool = Pool([shape] * layers, self.table.num_blocks, block_size, dtype, device)
        for held in (*self.pool.keys, *self.pool.values):
            held.normal_()
        self.query = torch.randn(case.requests * case.rows, heads.heads, heads.width, device=device).to(dtype)
        self.scale = heads.width**-0.5
        new = (2, 1, heads.kv_heads, case.requests * case.rows, heads.width)
        self.new_keys, self.new_values = torch.randn(new, device=device).to(dtype)

    @property
    def kv_bytes(self) -> int:
        """Bytes of the keys and values that one layer's attention sees."""
        held = 2 * int(self.ends.sum()) * self.heads.kv_heads * self.heads.width
        return held * self.query.element_size()

    @property
    def flop(self) -> float:
        """Floating-point operations of one layer's attention over what each row sees, four a pair and channel."""
        seen = self.prefix.sum() + np.bitwise_count(self.bits).sum()
        return 4.0 * float(seen) * self.heads.heads * self.heads.width

    @cached_property
    def branches(self) -> Branches | None:
        """The same tree behind each request's first new token; None: chains."""
        case = self.case
        if case.branching == 1:
            return None
        tree = fixed_shape(case.branching, case.rows - 1)
        parents, depths = (np.tile(part[: case.rows - 1], (case.requests, 1)) for part in (tree.parents, tree.depths))
        return Branches(self.starts.copy(), parents, depths)

    @cached_property
    def prefix(self) -> NDArray[np.int64]:
        """(requests, rows) a row sees the first so many slots of its request,"""
        if self.branches is None:
            return self.starts[:, None] + 1 + np.arange(self.case.rows)
        return np.tile(self.starts[:, None] + 1, (1, self.case.rows))

    @cached_property
    def bits(self) -> NDArray[np.int64]:
        """(requests, rows) and slot `prefix + i` where bit i is set."""
        found = np.zeros((self.case.requests, self.case.rows), dtype=np.int64)
        if self.branches is not None:
            for node in range(self.case.rows - 1):
                parent = self.branches.parents[:, node]
                found[:, 1 + node] = found[np.arange(len(found)), 1 + parent] | (1 << node)
        return found

    @cached_property
    def sees(self) -> NDArray[np.int64]:
        """(requests, rows) slots up to the last that a row sees."""
        highest = np.zeros_like(self.bits)
        for node in range(max(0, min(self.case.rows - 1, 63))):
            highest[(self.bits >> node) & 1 == 1] = node + 1
        return self.prefix + highest

    def keys_of(self, request: int, layer: int) -> tuple[Tensor, Tensor]:
        """(kv heads, cached tokens, width) keys and values of one request in the cache."""
        count = -(-int(self.ends[request]) // self.block_size)
        blocks = torch.from_numpy(self.table.blocks[request, :count].astype(np.int64)).to(self.device)
        shape = (-1, self.heads.kv_heads, self.block_size, self.heads.width)
        found = []
        for pool in (self.pool.keys[layer], self.pool.values[layer]):
            held = pool.view(shape)[blocks].transpose(0, 1)
            found.append(held.reshape(self.heads.kv_heads, -1, self.heads.width)[:, : self.ends[request]])
        return found[0], found[1]

    def reference(self, layer: int) -> Tensor:
        """(T, heads, width) attention in float64, one request and one head of keys at a time."""
        out = torch.empty(self.query.shape, dtype=torch.float64, device=self.device)
        repeat, rows = self.heads.heads // self.heads.kv_heads, self.case.rows
        for request in range(self.case.requests):
            keys, values = (held.double() for held in self.keys_of(request, layer))
            hidden = torch.from_numpy(self._hidden(request)).to(self.device)
            query = self.query[request * rows : (request + 1) * rows].double()
            for head in range(self.heads.heads):
                scores = query[:, head] @ keys[head // repeat].T * self.scale
                weights = scores.masked_fill(hidden, -torch.inf).softmax(-1)
                out[request * rows : (request + 1) * rows, head] = weights @ values[head // repeat]
        return out

    def _hidden(self, request: int) -> NDArray[np.bool_]:
        slots = np.arange(self.ends[request])
        behind = slots - self.prefix[request][:, None]
        branch = (self.bits[request][:, None] >> np.clip(behind, 0, 62)) & 1
        return (behind >= 0) & ((behind > 62) | (branch == 0))


@dataclass(frozen=True)
class Timed:
    """Seconds of one layer's attention: calls launched one by one, and replayed from a CUDA graph (None: cannot be)."""

    launched_s: float
    graph_s: float | None
    error: float
    """Largest difference to float64."""


def timed(batch: PagedBatch, attend: Attend, reference: Tensor, repeats: int) -> Timed:
    """Time a way to attend, over all layers of the batch, so that no layer's cache is left in the chip's own."""
    with torch.inference_mode():
        error = float((attend(0).double() - reference).abs().max())

        def every_layer() -> None:
            for layer in range(batch.layers):
                attend(layer)

        launched = seconds(every_layer, batch.device, repeats) / batch.layers
        graph = _captured(every_layer, batch.device)
        replayed = None if graph is None else seconds(graph.replay, batch.device, repeats) / batch.layers
    return Timed(launched, replayed, error)


def _captured(work: Callable[[], None], device: torch.device) -> torch.cuda.CUDAGraph | None:
    if device.type != "cuda":
        return None
    graph = torch.cuda.CUDAGraph()
    try:
        with torch.cuda.graph(graph):
            work()
    except RuntimeError:
        torch.cuda.synchronize(device)
        return None
    return graph
