"""A lookup table of (c, n) over the batch, its cached tokens and the queue: a policy without a network."""

import io
from collections.abc import Sequence
from functools import cached_property
from pathlib import Path
from typing import Annotated, Any, NamedTuple

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from controllers.compiled import KernelController
from controllers.controller import configured
from controllers.policy import PolicyError, read_stored, refuse_other_choices
from engine.compiled import kernel
from engine.core.action import ActionGrid
from engine.core.telemetry import DECODE_KV_TOKENS, NUM_DECODES, WAITING_TOKENS
from engine.files import write_whole
from engine.plant import Plant

SCHEMA = 1
AXES = ("decodes", "kv_tokens", "waiting_tokens")
"""Axes of a table, all from the observation's `load`."""
DECODES = (0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64, 96, 128, 192, 256)
KV_TOKENS = (0, 1_000, 2_000, 4_000, 8_000, 16_000, 32_000, 64_000, 128_000)
WAITING_TOKENS_EDGES = (0, 1, 64, 256, 512, 1_024, 2_048, 4_096, 8_192, 16_384, 65_536)


class TableHeader(BaseModel):
    """Metadata of a table.

    Args:
        name: label in tables.
        actions: the choices that its entries are indices into.
        made_of: the controller that it was distilled from, the engines and the number of decisions.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA
    name: str
    actions: ActionGrid
    made_of: dict[str, Any]


class Table(NamedTuple):
    """Entries for kernels: row i of an axis holds what is at least its edge i and below the next.

    decodes, kv_tokens, waiting_tokens: edges, ascending from 0 · candidates, budgets: (nB, nK, nQ) c and n in tokens.
    """

    decodes: NDArray[np.float64]
    kv_tokens: NDArray[np.float64]
    waiting_tokens: NDArray[np.float64]
    candidates: NDArray[np.int64]
    budgets: NDArray[np.int64]


@kernel
def cell(edges, value):
    """The last edge that is not above the value."""
    low, high = 0, edges.shape[0]
    while high - low > 1:
        middle = (low + high) >> 1
        if edges[middle] <= value:
            low = middle
        else:
            high = middle
    return low


@kernel
def decide(observation, instance, params, memory):
    """(c, n) in tokens of the next action for an instance."""
    load = observation.load
    i = cell(params.decodes, load[instance, NUM_DECODES])
    j = cell(params.kv_tokens, load[instance, DECODE_KV_TOKENS])
    k = cell(params.waiting_tokens, load[instance, WAITING_TOKENS])
    return params.candidates[i, j, k], params.budgets[i, j, k]


def tabulate(
    places: NDArray[np.float64],
    chosen: NDArray[np.int64],
    grid: ActionGrid,
    edges: Sequence[Sequence[float]] = (DECODES, KV_TOKENS, WAITING_TOKENS_EDGES),
    budget_quantile: float = 0.5,
) -> Table:
    """The table of a controller's decisions.

    An entry is the median index of c, and a quantile of the index of n, over the decisions in its bin. An empty bin
    takes the entry of the nearest non-empty one, in steps along the axes.

    Args:
        places: (D, 3) decodes, cached tokens and waiting tokens at each decision.
        chosen: (D, 2) indices of c and n.
    """
    axes = [np.asarray(edge, dtype=np.float64) for edge in edges]
    index = np.stack([np.searchsorted(axis, places[:, i], side="right") - 1 for i, axis in enumerate(axes)], axis=1)
    shape = tuple(len(axis) for axis in axes)
    flat = np.ravel_multi_index(tuple(index.T), shape)
    order = np.argsort(flat, kind="stable")
    cells, starts = np.unique(flat[order], return_index=True)
    entries = np.array(
        [
            (np.median(part[:, 0]), np.quantile(part[:, 1], budget_quantile))
            for part in np.split(chosen[order], starts[1:])
        ],
        dtype=np.float64,
    ).round()
    here = np.stack(np.unravel_index(cells, shape), axis=1)
    every = np.stack(np.unravel_index(np.arange(int(np.prod(shape))), shape), axis=1)
    nearest = np.array([np.abs(here - place).sum(axis=1).argmin() for place in every])
    full = entries[nearest].astype(np.int64).reshape(*shape, 2)
    decodes, kv_tokens, waiting_tokens = axes
    return Table(decodes, kv_tokens, waiting_tokens, grid.candidates[full[..., 0]], grid.budgets[full[..., 1]])


def save_table(path: Path, header: TableHeader, table: Table) -> None:
    """Write the file atomically."""
    content = io.BytesIO()
    np.savez_compressed(content, header=np.array(header.model_dump_json()), **table._asdict())
    write_whole(path, content.getvalue())


def load_table(name_or_path: str) -> tuple[TableHeader, Table]:
    """A table shipped in `controllers/policies` by name, or one by path. PolicyError when it cannot be used."""
    path, plain, arrays = read_stored(name_or_path, "table", "runs.distill", SCHEMA, Table._fields)
    try:
        return TableHeader.model_validate(plain), Table(**arrays)
    except ValidationError as error:
        raise PolicyError(f"{path} is no table that python -m runs.distill wrote, or damaged") from error


@configured
class Tabulated(KernelController):
    """A table that `python -m runs.distill` made of another controller.

    Args:
        path: a table file, or the name of a shipped one.
    """

    decision_s = 10e-6
    decide = staticmethod(decide)

    path: Annotated[str, Field(min_length=1)] = "vicuna_7b_a100_table"

    @cached_property
    def content(self) -> tuple[TableHeader, Table]:
        """The file's content. PolicyError when it is not there or cannot be used."""
        return load_table(self.path)

    def params(self, plant: Plant) -> Table:
        """The table. PolicyError when it was made for other choices."""
        header, table = self.content
        refuse_other_choices(header.name, header.actions, plant.grid)
        return table

    def label(self) -> str:
        """The table's own name."""
        return self.content[0].name
