"""A Hugging Face causal language model over a paged cache."""

from __future__ import annotations

import copy
import math
import re
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from engine.backends.torch.attention import LayerShape, PagedStep, Pool, ProbeStep, attending, configs_of
from engine.backends.torch.compiled import CompiledLlama
from engine.backends.torch.fused import FusedLlama
from engine.backends.torch.pack import EXACT_ROWS, pack
from engine.backends.torch.table import CacheTable
from engine.backends.torch.triton_llama import TritonLlama
from engine.limits import EngineLimits
from engine.speculation.sampling import finite_rows, most_probable
from engine.speculation.tree import Branches

TOLERANCE = {torch.float64: 5e-6, torch.float32: 1e-3, torch.bfloat16: 0.15, torch.float16: 0.05}
"""Largest accepted difference of logits due to packing, as a share of the logits' standard deviation.

In float64 too, some models take their softmax in float32 (Gemma 2).
"""

ROUNDED = 2
"""Differences of logits up to this many units in the last place are ignored."""

REACH = re.compile(r"window|chunk|keep|local_attention|span|stride|block_size|topk|floor_scale")
"""Settings of a model that may limit its attention span, or change its attention from some position on."""

CHECKED_ROWS = 8
"""Logits compared before and behind each such position."""

CHECKED_CHUNK = 512
"""Most tokens of a packed forward of a long comparison."""

STRETCHED_ROPE = ("dynamic", "longrope")
"""Kinds of rotary embedding whose angles change for all positions once a forward holds a later one."""


Way = CompiledLlama | TritonLlama | FusedLlama
"""A faster forward of a model than calling its modules."""


class UnsupportedModelError(ValueError):
    """The model cannot run over a paged cache; the message names the check and its result."""


class PagedModel:
    """A model whose keys and values live in the blocks of a `CacheTable`, many requests to a forward.

    The model is checked on construction: every layer must call the attention interface, and a packed forward must give
    the logits of a plain one; `UnsupportedModelError` otherwise.

    Args:
        model: a `transformers` causal language model. Its values stay as they are; if fused, its projections become
            views of joined weights (transposed ones, which cannot be saved as they are, for `CompiledLlama`).
        num_blocks: cache blocks, those for scratch included (`CacheTable.num_blocks`).
        block_size: tokens per block.
        fused: use a faster forward of Llama-family models where it gives the same logits: `CompiledLlama` on a CPU
            in float32, `TritonLlama` on a GPU, `FusedLlama` otherwise.
        exact: for tests. A float64 copy of the model, and shapes that make every row's result independent of the
            rest of the batch, bit for bit.
        max_model_len: most tokens of a request; None: as many as the cache holds. Every figure of the model's
            configuration below it that may bound attention (`reaches`) is passed once by the check, at the cost of
            about two prompts of that length.
    """

    def __init__(
        self,
        model: Any,
        num_blocks: int,
        block_size: int,
        *,
        fused: bool = True,
        exact: bool = False,
        max_model_len: int | None = None,
    ) -> None:
        self.model = (copy.deepcopy(model).double() if exact else model).eval()
        self.exact = exact
        self._configs = configs_of(self.model)
        self.device: torch.device = self.model.device
        self.dtype: torch.dtype = self.model.dtype
        text = self.model.config.get_text_config()
        self.vocab_size: int = text.vocab_size
        _check_rope(self.model, num_blocks * block_size)
        shapes = _probe(self.model, text.num_hidden_layers, self.vocab_size)
        most = min(num_blocks * block_size, max_model_len or num_blocks * block_size)
        self._reaches = reaches(text, most)
        past = (reach + min(reach, CHECKED_CHUNK) for reach in self._reaches.values())
        self._longest = min(most, max(past, default=0))
        self.fused: Way | None = None
        self._defers = False
        try:
            if fused:
                self.fused = self._shorter_way(shapes)
            found = "" if self.fused is not None else self._problem(shapes)
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(self.model).__name__} does not run over a paged cache ({_said(error)})"
            ) from error
        if found:
            raise UnsupportedModelError(f"{type(self.model).__name__}: {found}; choose another model")
        self.pool = Pool(shapes, num_blocks, block_size, self.dtype, self.device)

    @classmethod
    def load(
        cls,
        source: str | Path,
        num_blocks: int,
        block_size: int,
        *,
        dtype: str = "auto",
        device: str = "cpu",
        fused: bool = True,
        exact: bool = False,
    ) -> PagedModel:
        """Load a local folder or a hub id; see the class for the rest. Raises ModelFilesError."""
        from engine.models.load import load_pretrained

        model = load_pretrained(str(source), dtype)
        return cls(model.to(device), num_blocks, block_size, fused=fused, exact=exact)

    def forward(
        self,
        table: CacheTable,
        seats: NDArray[np.int64],
        starts: NDArray[np.int64],
        counts: NDArray[np.int64],
        keep: NDArray[np.int64],
        branches: Branches | None = None,
    ) -> Tensor:
        """Run `counts[i]` tokens from cache slot `starts[i]` of every batch slot in one pass, and cache them.

        Returns logits (sum of keep, V) of the last `keep[i]` tokens of each request, in the order of `seats`. Cache
        slots before `starts[i]` must be cached already. Without `branches` all is plain text, and a cache slot is a
        position. The logits are valid until the next forward.
        """
        return self._forward(self.pool, table, seats, starts, counts, keep, branches)

    def top(self, logits: Tensor, count: int = 1) -> NDArray[np.int64]:
        """(rows, count) tokens with the highest of the logits that the latest forward returned, falling.

        After `defer_to` they may be deferred tokens, which `known` of the other model looks up.
        """
        if isinstance(self.fused, TritonLlama):
            promised = self.fused.top(logits, count)
            return promised if self._defers else self.known(promised, settle=True)
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if count == 1:
            return most_probable(logits)[:, None]
        found: NDArray[np.int64] = logits.topk(count, dim=-1).indices.cpu().numpy()
        return found

    def finite(self, logits: Tensor, choices: NDArray[np.int64]) -> NDArray[np.bool_]:
        """(rows,) True where the latest forward's logits are finite, given its `top` (see `finite_rows`).

        Elsewhere the choice is an arbitrary token.
        """
        if isinstance(self.fused, TritonLlama):
            return self.fused.finite()
        return finite_rows(logits, choices)

    def defer_to(self, other: PagedModel) -> None:
        """Keep this model's choices on the device until `other`'s choices are read, where both support it."""
        if isinstance(self.fused, TritonLlama) and isinstance(other.fused, TritonLlama):
            self.fused.join(other.fused.promises)
            self._defers = True

    def known(self, tokens: NDArray[np.integer], settle: bool = False) -> NDArray[np.int64]:
        """Tokens with deferred ones filled in; `settle`: including those of the forwards since the last `settle`."""
        if not isinstance(self.fused, TritonLlama):
            return tokens.astype(np.int64, copy=False)
        if settle:
            self.fused.promises.settle()
        return self.fused.promises.known(tokens)

    def move(
        self, table: CacheTable, seats: NDArray[np.int64], source: NDArray[np.int64], target: NDArray[np.int64]
    ) -> None:
        """Copy the cache at slot `source[i]` of a request to its slot `target[i]`."""
        size = table.block_size
        places = [(table.blocks[seats, slots // size], slots % size) for slots in (source, target)]
        with torch.inference_mode():
            self.pool.move(np.array(places, dtype=np.int64))

    def prepare(self, table: CacheTable, trees: bool) -> None:
        """Do in advance the set-up work of first forwards over such a table; with `trees`, also for trees."""
        if isinstance(self.fused, TritonLlama):
            self.fused.prepare(self.pool, table, trees)

    def _forward(
        self,
        pool: Pool,
        table: CacheTable,
        seats: Any,
        starts: Any,
        counts: Any,
        keep: Any,
        branches: Branches | None = None,
    ) -> Tensor:
        if not isinstance(self.fused, TritonLlama):
            # Only its kernel never reads a masked slot.
            pool.clear(table.unfilled(seats, starts, counts))
        if isinstance(self.fused, CompiledLlama | TritonLlama):
            return self.fused(pool, table, seats, starts, counts, keep, branches)
        packed = pack(table, seats, starts, counts, keep, self.device, self.exact, branches)
        rows = packed.kept
        wanted = rows.numel()
        if wanted == 0:
            # `logits_to_keep` cannot express "none" for every model.
            rows = rows.new_zeros(1)
        if self.exact and rows.numel() < EXACT_ROWS:
            rows = torch.cat((rows, rows[-1:].expand(EXACT_ROWS - rows.numel())))
        step = PagedStep(pool, packed, self.exact)
        if self.fused is not None:
            with torch.inference_mode():
                return self.fused(packed.ids, packed.positions, rows, step)[:wanted]
        with torch.inference_mode(), attending(self._configs, step):
            output = self.model(
                input_ids=packed.ids, position_ids=packed.positions, use_cache=False, logits_to_keep=rows
            )
        return output.logits[0, :wanted]

    def _shorter_way(self, shapes: list[LayerShape]) -> Way | None:
        """The first runner that reproduces this model's plain logits."""
        ways: tuple[type[Way], ...] = (CompiledLlama, TritonLlama, FusedLlama)
        for way in ways:
            if way.supports(self.model, shapes):
                self.fused = way(self.model, shapes)
                if not self._problem(shapes):
                    return self.fused
                self.fused = None
        return None

    def _problem(self, shapes: list[LayerShape]) -> str:
        """Difference between packed and plain forward, as text; empty where their logits agree."""
        tolerance = TOLERANCE.get(self.dtype, 0.05)
        lengths, parts = (5, 19, 40), ((3, 15, 16), (1, 4, 20), (1, 0, 4))
        error, where = self._packing_error(shapes, lengths, parts, parts), ""
        if error <= tolerance and self._longest > max(lengths):
            counts, keep = _passing(list(self._reaches.values()), self._longest)
            error = self._packing_error(shapes, (self._longest,), counts, keep)
            named = ", ".join(f"{name}={value}" for name, value in self._reaches.items())
            where = f", past what its configuration bounds ({named}) in a text of {self._longest} tokens"
        if error <= tolerance:
            return ""
        if math.isnan(error):
            return "its logits are not finite, so its weights are damaged or too large for its dtype"
        return (
            f"logits of a packed forward over a paged cache differ from a plain forward's by {error:.2g} of their "
            f"standard deviation{where}. It attends in a way that the paged cache does not do"
        )

    def _packing_error(
        self,
        shapes: list[LayerShape],
        lengths: Sequence[int],
        parts: Sequence[Sequence[int]],
        keep: Sequence[Sequence[int]],
    ) -> float:
        """Largest difference between logits of packed chunks and of plain forwards, in their standard deviations.

        The rounding error of the logits themselves is subtracted: large logits are rounded coarsely.

        Args:
            shapes: of the layers.
            lengths: tokens of each text.
            parts: by forward, the number of tokens of each text it runs.
            keep: by forward, the last of these whose logits are compared.
        """
        size, random = 16, np.random.default_rng(1)
        width = -(-max(lengths) // size)
        limits = EngineLimits(len(lengths) * width, size, 0, len(lengths), width * size)
        table = CacheTable(limits)
        pool = Pool(shapes, table.num_blocks, size, self.dtype, self.device)
        blocks = np.random.default_rng(0).permutation(limits.total_blocks)
        table.blocks[: len(lengths), :width] = blocks.reshape(len(lengths), width)
        plain: list[Tensor] = []
        for seat, length in enumerate(lengths):
            table.tokens[seat, :length] = random.integers(0, self.vocab_size, length)
            ids = torch.from_numpy(table.tokens[seat : seat + 1, :length].astype(np.int64)).to(self.device)
            ends = np.cumsum([part[seat] for part in parts]).tolist()
            rows = np.concatenate([np.arange(end - kept[seat], end) for end, kept in zip(ends, keep, strict=True)])
            wanted = torch.from_numpy(rows).to(self.device)
            with torch.inference_mode():
                plain.append(self.model(input_ids=ids, use_cache=False, logits_to_keep=wanted).logits[0])
        starts, done = np.zeros((2, len(lengths)), dtype=np.int64)
        packed: list[Tensor] = []
        for part, kept in zip(parts, keep, strict=True):
            counts, rows = np.array(part, dtype=np.int64), np.array(kept, dtype=np.int64)
            seats = np.flatnonzero(counts)
            logits = self._forward(pool, table, seats, starts[seats], counts[seats], rows[seats])
            for seat, found in zip(seats.tolist(), logits.split(rows[seats].tolist()), strict=True):
                expected = plain[seat][done[seat] : done[seat] + len(found)]
                rounding = ROUNDED * torch.finfo(self.dtype).eps * expected.abs()
                packed.append(((found - expected).abs() - rounding).clamp_min(0.0))
            starts += counts
            done += rows
        return float(torch.cat(packed).max() / torch.cat(plain).std())


def reaches(config: Any, most: int) -> dict[str, int]:
    """Figures of a model's configuration, by key, past which its attention may differ and a request may come.

    Windows, chunks, tokens kept, and the like, above 1 and below `most` tokens.
    """
    found = {}
    for name, value in config.to_dict().items():
        entries = value if isinstance(value, list | tuple) else (value,)
        figures = [entry for entry in entries if type(entry) is int and 1 < entry < most]
        if REACH.search(name) and figures:
            found[name] = max(figures)
    return found


def _passing(reaches: Sequence[int], length: int) -> tuple[list[tuple[int]], list[tuple[int]]]:
    """Tokens of each forward of one text, and of these the last that are compared: around each reach and at the end."""
    edges = {place for reach in reaches for place in (reach, reach + CHECKED_ROWS) if place < length} | {length}
    counts, keep, start = [], [], 0
    for edge in sorted(edges):
        while edge - start > CHECKED_CHUNK:
            counts.append((CHECKED_CHUNK,))
            keep.append((0,))
            start += CHECKED_CHUNK
        counts.append((edge - start,))
        keep.append((min(CHECKED_ROWS, edge - start),))
        start = edge
    return counts, keep


def _said(error: Exception) -> str:
    return f"{type(error).__name__}: {' '.join(str(error).split())}"


def _check_rope(model: Any, most_tokens: int) -> None:
    """Refuse rotary embeddings that packing changes: the longest request would set the angles of all others."""
    for module in model.modules():
        kinds = getattr(module, "rope_type", None)
        for kind in kinds.values() if isinstance(kinds, dict) else (kinds,):
            usual = getattr(module, "original_max_seq_len", 0)
            if kind == "longrope":
                usual = module.config.rope_parameters.get("original_max_position_embeddings", usual)
            if kind in STRETCHED_ROPE and most_tokens > usual:
                raise UnsupportedModelError(
                    f"{type(model).__name__}: its rotary embedding ({kind}) changes past {usual} tokens by the longest "
                    f"sequence of the batch, and this cache holds {most_tokens}; make the cache no larger than that "
                    "(num_kv_blocks * block_size), or choose another model"
                )


def _probe(model: Any, layers: int, vocab_size: int) -> list[LayerShape]:
    """Cache shape of each layer, found by one forward through the attention interface."""
    step = ProbeStep()
    name = type(model).__name__
    try:
        with torch.inference_mode(), attending(configs_of(model), step):
            ids = torch.arange(4, device=model.device)[None] % vocab_size
            model(input_ids=ids, position_ids=torch.arange(4, device=model.device)[None], use_cache=False)
    except Exception as problem:
        raise UnsupportedModelError(f"{name} does not run with its attention replaced ({_said(problem)})") from problem
    if len(step.shapes) != layers:
        raise UnsupportedModelError(
            f"{name}: {len(step.shapes)} of {layers} layers called transformers' attention interface, through which "
            "the paged cache works; choose a model that uses it in every layer (Llama, Qwen, Mistral, GPT-2, ...)"
        )
    return step.shapes
