"""Attention over the paged cache, as a function that `transformers` models call in place of their own.

The function is registered under `NAME` in `ALL_ATTENTION_FUNCTIONS`; no mask function is registered under that name, so
models build no mask. Which forward it works for is not passed through the models, some of which drop keyword arguments
they do not know: it is the current step of this thread.
"""

from __future__ import annotations

import threading
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812
from numpy.typing import NDArray
from torch import Tensor
from transformers import AttentionInterface

from engine.backends.torch.pack import EXACT_ROWS, Pack

NAME = "governor_paged"

_UNKNOWN = ("attention_mask", "position_bias", "head_mask", "indices", "block_indices", "sinks", "alibi")
"""Unsupported attention options of layers, beyond scale, window, softcap and sinks."""


class Step(Protocol):
    """Attention of one forward, layer by layer."""

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, options: dict[str, Any]) -> Tensor:
        """Attention output (1, T, heads, width) of the next layer for query, key, value (1, heads, T, width)."""


class LayerShape(NamedTuple):
    """Cache shape and attention options of one layer."""

    kv_heads: int
    key_width: int
    value_width: int
    scale: float | None
    window: int | None
    """Latest positions seen; None for all."""


class _Current(threading.local):
    step: Step | None = None


_current = _Current()


def _attention(
    module: Any,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Any,
    scaling: float | None = None,
    **options: Any,
) -> tuple[Tensor, None]:
    if _current.step is None:
        raise RuntimeError(f"attention {NAME!r} works only inside a forward of PagedModel")
    if "sliding_window" not in options:
        options["sliding_window"] = getattr(module, "sliding_window", None)
    # No mask is made for this function, so a mask that arrives is the layer's own.
    options["attention_mask"] = attention_mask
    return _current.step.attend(query, key, value, scaling, options), None


AttentionInterface.register(NAME, _attention)


def configs_of(model: Any) -> list[Any]:
    """The configurations that the model's modules hold: layers that were copied one by one have their own."""
    found = {id(module.config): module.config for module in model.modules() if hasattr(module, "config")}
    return list(found.values())


@contextmanager
def attending(configs: list[Any], step: Step) -> Iterator[None]:
    """Context in which modules of these configurations attend through `step`; restores them afterwards."""
    usual = [config._attn_implementation for config in configs]
    outer, _current.step = _current.step, step
    try:
        for config in configs:
            config._attn_implementation = NAME
        yield
    finally:
        _current.step = outer
        for config, name in zip(configs, usual, strict=True):
            config._attn_implementation = name


class Pool:
    """Keys and values of all layers in blocks, and a buffer they are gathered into.

    Per layer two tensors (blocks * kv_heads, block_size * width), so that each head's keys of a gathered request are in
    one piece: attention of few query rows reads them 1.5 times as fast as interleaved ones. Attention multiplies masked
    values by zero, and zero times NaN is NaN. Unused slots are therefore zero, and the slots of a block are zeroed
    (`clear`) when another request gets it.
    """

    def __init__(
        self, shapes: list[LayerShape], num_blocks: int, block_size: int, dtype: torch.dtype, device: Any
    ) -> None:
        def zeros(tensors: int, heads: int, width: int) -> Tensor:
            return torch.zeros(tensors, num_blocks * heads, block_size * width, dtype=dtype, device=device)

        self.num_blocks, self.block_size = num_blocks, block_size
        alike = len({(shape.kv_heads, shape.key_width, shape.value_width) for shape in shapes}) == 1
        groups = [shapes] if alike else [[shape] for shape in shapes]
        keys = [zeros(len(group), group[0].kv_heads, group[0].key_width) for group in groups]
        values = [zeros(len(group), group[0].kv_heads, group[0].value_width) for group in groups]
        self._pieces = keys + values
        """Tensors (layers or 1, blocks * kv_heads, block_size * width) that the layers' own are views of."""
        self.keys, self.values = ([layer for piece in pieces for layer in piece] for pieces in (keys, values))
        self._buffers = [torch.empty(0, dtype=dtype, device=device) for _ in range(2)]

    def gather(self, layer: int, index: Tensor) -> tuple[Tensor, Tensor]:
        """The rows `index` of a layer, (block, head) pairs, copied into buffers that are reused by the next call."""
        found = []
        for which, pool in enumerate((self.keys[layer], self.values[layer])):
            needed = index.numel() * pool.shape[1]
            if self._buffers[which].numel() < needed:
                # Growing by half keeps a slowly longer batch from allocating, and faulting pages in, every iteration.
                self._buffers[which] = torch.empty(needed + needed // 2, dtype=pool.dtype, device=pool.device)
            out = self._buffers[which][:needed].view(index.numel(), -1)
            found.append(torch.index_select(pool, 0, index, out=out))
        return found[0], found[1]

    def clear(self, places: tuple[NDArray[np.int64], NDArray[np.int64]]) -> None:
        """Zero keys and values of all layers in slots, given their blocks and places within them."""
        block, place = places
        if not len(block):
            return
        for piece in self._pieces:
            heads = np.arange(piece.shape[1] // self.num_blocks)
            rows = ((block[:, None] * len(heads) + heads) * self.block_size + place[:, None]).reshape(-1)
            slots = piece.view(len(piece), self.num_blocks * len(heads) * self.block_size, -1)
            slots.index_fill_(1, torch.from_numpy(rows).to(piece.device), 0.0)

    def move(self, places: NDArray[np.int64]) -> None:
        """Copy keys and values of all layers: (2, 2, tokens), from blocks and places within them, to blocks and places.

        Does not wait for the GPU.
        """
        device = self._pieces[0].device
        host = torch.from_numpy(places)
        (begin, from_place), (end, to_place) = (host.pin_memory() if device.type == "cuda" else host).to(
            device, non_blocking=True
        )
        for piece in self._pieces:
            heads = torch.arange(piece.shape[1] // self.num_blocks, device=device)
            source, target = (
                ((block[:, None] * len(heads) + heads) * self.block_size + place[:, None]).view(-1)
                for block, place in ((begin, from_place), (end, to_place))
            )
            slots = piece.view(len(piece), self.num_blocks * len(heads) * self.block_size, -1)
            slots.index_copy_(1, target, slots.index_select(1, source))


class PagedStep:
    """One packed forward: new keys and values go to the pool, then each group attends over its requests' cache."""

    def __init__(self, pool: Pool, pack: Pack, exact: bool) -> None:
        self._pool, self._pack = pool, pack
        self._least_rows = EXACT_ROWS if exact else 0
        self._layer = 0

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, options: dict[str, Any]) -> Tensor:
        """See `Step.attend`."""
        layer, self._layer = self._layer, self._layer + 1
        pool, heads, kv_heads = self._pool, query.shape[1], key.shape[1]
        for store, new in ((pool.keys[layer], key), (pool.values[layer], value)):
            rows = new[0].transpose(0, 1).reshape(-1, new.shape[-1])
            store.view(-1, new.shape[-1]).index_copy_(0, self._pack.slots(kv_heads), rows)
        rows = query[0].transpose(0, 1)
        repeat, width = heads // kv_heads, value.shape[-1]
        out = query.new_empty(rows.shape[0], heads, width)
        for group in self._pack.groups:
            keys, values = pool.gather(layer, group.index(kv_heads))
            mask = group.mask(repeat, options.get("sliding_window"), self._least_rows, query.dtype)
            # Heads that share keys become query rows, so that keys are never repeated.
            new = rows[group.start : group.end] if group.padding is None else rows.index_select(0, group.padding[0])
            folded = new.view(group.size, group.count, kv_heads, repeat, query.shape[-1])
            folded = folded.transpose(1, 2).reshape(group.size, kv_heads, group.count * repeat, -1)
            missing = mask.shape[2] - folded.shape[2]
            if missing > 0:
                folded = F.pad(folded, (0, 0, 0, missing))
            found = _attended(
                folded,
                keys.view(group.size, kv_heads, group.keys, -1),
                values.view(group.size, kv_heads, group.keys, -1),
                mask,
                scale,
                options,
            )[:, :, : group.count * repeat]
            found = found.reshape(group.size, kv_heads, group.count, repeat, width).transpose(1, 2)
            if group.padding is not None:
                found = found.reshape(-1, heads, width).index_select(0, group.padding[1])
            out[group.start : group.end].view(found.shape).copy_(found)
        return out[None]


def _attended(
    query: Tensor, key: Tensor, value: Tensor, mask: Tensor, scale: float | None, options: dict[str, Any]
) -> Tensor:
    """Attention of query rows (R, kv heads, rows, width) as a layer's options ask for.

    `softcap`: scores are squashed to +-softcap (Gemma 2, section 2). `s_aux`: (heads,) a score per head that takes
    part in the softmax and has no value (gpt-oss); rows are (new token, head within its key-value head) pairs.
    """
    softcap, sinks = options.get("softcap"), options.get("s_aux")
    if softcap is None and sinks is None:
        return F.scaled_dot_product_attention(query, key, value, attn_mask=mask, scale=scale)
    scores = query @ key.transpose(-1, -2) * (query.shape[-1] ** -0.5 if scale is None else scale)
    if softcap is not None:
        scores = torch.tanh(scores / softcap) * softcap
    scores = scores + mask
    if sinks is not None:
        kv_heads, rows = query.shape[1:3]
        own = sinks.view(kv_heads, -1)
        row_sinks = own.repeat(1, -(-rows // own.shape[1]))[:, :rows]
        scores = torch.cat(
            (scores, row_sinks.to(scores.dtype)[None, :, :, None].expand(len(scores), -1, -1, 1)), dim=-1
        )
    return scores.softmax(-1)[..., : key.shape[2]] @ value


class ProbeStep:
    """A plain causal forward that records the options of the model's layers."""

    def __init__(self) -> None:
        self.shapes: list[LayerShape] = []

    def attend(self, query: Tensor, key: Tensor, value: Tensor, scale: float | None, options: dict[str, Any]) -> Tensor:
        """See `Step.attend`."""
        unknown = [name for name in _UNKNOWN if options.get(name) is not None]
        if unknown:
            raise NotImplementedError(f"its layers attend with {', '.join(unknown)}")
        window = options.get("sliding_window")
        self.shapes.append(LayerShape(key.shape[1], key.shape[-1], value.shape[-1], scale, window))
        repeat = query.shape[1] // key.shape[1]
        key, value = key.repeat_interleave(repeat, dim=1), value.repeat_interleave(repeat, dim=1)
        return F.scaled_dot_product_attention(query, key, value, is_causal=True, scale=scale).transpose(1, 2)
