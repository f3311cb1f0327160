"""A learned policy in one file: weights, normalisation, features, choices, and provenance."""

import io
import json
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field, ValidationError, model_validator

from controllers.analytic import Analytic
from controllers.features import Layout
from controllers.network import ACTIVATIONS, Network
from engine.core.action import ActionGrid
from engine.files import write_whole

SCHEMA = 1
POLICIES_FOLDER = Path(__file__).parent / "policies"
HEADER = "header"
ARRAYS = ("mean", "scale", "lstm", "sizes", "weights")

Head = Literal["pair", "joint", "box"]
"""Meaning of the network's outputs: one number for each c and one for each n; one for each (c, n); or a place in
[-1, 1] along the choices of c and one along those of n, before a tanh."""
HEADS: tuple[Head, ...] = ("pair", "joint", "box")


class PolicyError(ValueError):
    """A policy file is broken, of another version, or made for another setup."""


class Residual(BaseModel):
    """A policy that shifts another controller's choice by a few steps along the choices of c and of n.

    Args:
        candidates, budgets: most steps either way.
        base: settings of the `analytic` controller that is shifted, where they are not its defaults. Its TTFT target is
            the policy's.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    candidates: Annotated[int, Field(ge=0, le=8)] = 2
    budgets: Annotated[int, Field(ge=0, le=12)] = 3
    base: dict[str, float | bool | str] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _instructed(self) -> Self:
        if "ttft_target" in self.base:
            raise ValueError("base.ttft_target is the policy's own ttft_target; leave it out")
        self.controller(1.0)
        return self

    def controller(self, ttft_target: float) -> Analytic:
        """The controller that is shifted."""
        return Analytic(ttft_target=ttft_target, **self.base)  # type: ignore[arg-type]  # pydantic checks


class Header(BaseModel):
    """Metadata of a policy file.

    Args:
        name: label in tables.
        features: names of its inputs, in order (`Layout.names`, then the base's choice if it is residual).
        layout: choice of its features.
        actions: the choices that it picks from.
        decide_every: iterations that a choice holds.
        residual: the base policy whose choice it shifts; None if it chooses by itself.
        head, masked: mapping of its outputs to a choice; True excludes choices without effect.
        ttft_target, tpot_target: the targets in s that it was trained for.
        hidden, activation: see `controllers.network.Network`.
        env: digest of the environment's configuration that it was trained in.
        trained: provenance: algorithm, seed, steps, command, code.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    schema_version: int = SCHEMA
    name: str
    features: tuple[str, ...]
    layout: Layout
    actions: ActionGrid
    decide_every: Annotated[int, Field(ge=1)] = 1
    residual: Residual | None = None
    head: Head = "pair"
    masked: bool = False
    ttft_target: Annotated[float, Field(gt=0.0)]
    tpot_target: Annotated[float, Field(gt=0.0)]
    hidden: Annotated[int, Field(ge=0)] = 0
    activation: Literal["tanh", "relu"] = "tanh"
    env: str = ""
    trained: dict[str, Any] = Field(default_factory=dict)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        if self.masked and (self.residual is not None or self.head != "pair"):
            raise ValueError("masked policies choose c and n from the grid itself: neither residual nor another head")
        return self

    @property
    def outputs(self) -> int:
        """Number of network outputs."""
        c, n = spread(self.actions, self.residual)
        return {"pair": c + n, "joint": c * n, "box": 2}[self.head]


def spread(actions: ActionGrid, residual: Residual | None) -> tuple[int, int]:
    """Numbers of values for c and n: the choices, or the shifts of a residual policy."""
    if residual is None:
        return len(actions.candidate_choices), len(actions.budget_choices)
    return 2 * residual.candidates + 1, 2 * residual.budgets + 1


def input_names(layout: Layout, actions: ActionGrid, residual: Residual | None) -> tuple[str, ...]:
    """Names of a policy's inputs in order."""
    names = layout.names(actions)
    if residual is not None:
        names += tuple(f"base_c_{c}" for c in actions.candidate_choices)
        names += tuple(f"base_n_{n}" for n in actions.budget_choices)
    return names


@dataclass(frozen=True)
class Policy:
    """A policy as it is saved."""

    header: Header
    network: Network

    def __post_init__(self) -> None:
        network, header = self.network, self.header
        width = len(header.features)
        after = network.hidden if network.hidden > 0 else width
        layers = list(zip(network.sizes[:-1].tolist(), network.sizes[1:].tolist(), strict=True))
        ends = (int(network.sizes[0]), int(network.sizes[-1])) if len(network.sizes) else None
        whole = (
            len(network.mean) == len(network.scale) == width
            and network.hidden == header.hidden
            and len(network.lstm) == (width + network.hidden + 1) * 4 * network.hidden
            and ends == (after, header.outputs)
            and len(network.weights) == sum((ins + 1) * outs for ins, outs in layers)
        )
        if not whole or not all(np.isfinite(array).all() for array in (network.mean, network.scale, network.weights)):
            raise PolicyError(f"{header.name}: its weights do not fit its {width} inputs and {header.outputs} outputs")

    def save(self, path: Path) -> None:
        """Write the file atomically. The same policy always gives the same bytes."""
        content = io.BytesIO()
        arrays: dict[str, Any] = {name: getattr(self.network, name) for name in ARRAYS}
        arrays[HEADER] = np.array(self.header.model_dump_json())
        np.savez(content, **arrays)
        write_whole(path, content.getvalue())

    @classmethod
    def load(cls, name_or_path: str | Path) -> "Policy":
        """A policy shipped in `controllers/policies` by name, or one by path.

        Raises:
            PolicyError: no such policy, a broken file, another schema, or an observation layout that has changed since.
        """
        path, plain, arrays = read_stored(name_or_path, "policy", "runs.train", SCHEMA, ARRAYS)
        header = _header(path, plain)
        network = Network(
            mean=arrays["mean"].astype(np.float32),
            scale=arrays["scale"].astype(np.float32),
            lstm=arrays["lstm"].astype(np.float32),
            hidden=header.hidden,
            sizes=arrays["sizes"].astype(np.int64),
            weights=arrays["weights"].astype(np.float32),
            activation=ACTIVATIONS.index(header.activation),
        )
        return cls(header, network)


def read_stored(
    name_or_path: str | Path, kind: str, maker: str, schema: int, names: Iterable[str]
) -> tuple[Path, Any, dict[str, NDArray[Any]]]:
    """Path, header and arrays of a file shipped in `controllers/policies` by name, or of one by path.

    Raises PolicyError: no such file, or not a `kind` that `maker` wrote with this `schema`.
    """
    path = Path(name_or_path)
    if path.suffix != ".npz":
        path = POLICIES_FOLDER / f"{name_or_path}.npz"
    if not path.is_file():
        shipped = ", ".join(shipped_policies()) or "none"
        raise PolicyError(
            f"no {kind} {str(name_or_path)!r}: give the path of a .npz that python -m {maker} wrote, or one of those "
            f"shipped: {shipped}"
        )
    try:
        with np.load(path, allow_pickle=False) as stored:
            header = json.loads(str(stored[HEADER]))
            version = header.get("schema_version")
            arrays = {name: stored[name] for name in names if version == schema}
    except Exception as error:  # a damaged file may raise anything in numpy
        raise PolicyError(f"{path} is no {kind} that python -m {maker} wrote, or damaged: {_said(error)}") from error
    if version != schema:
        raise PolicyError(
            f"{path} has schema {version}, this version reads {schema}: make it anew with python -m {maker}"
        )
    return path, header, arrays


def _said(error: Exception) -> str:
    return " ".join(str(error).split()) or type(error).__name__


def _header(path: Path, plain: Any) -> Header:
    try:
        header = Header.model_validate(plain)
    except ValidationError as error:
        raise PolicyError(f"{path} is no policy that python -m runs.train wrote: {_said(error)}") from error
    now = input_names(header.layout, header.actions, header.residual)
    if header.features != now:
        gone = sorted(set(header.features) - set(now))
        new = sorted(set(now) - set(header.features))
        what = "; ".join(
            f"{word} {', '.join(names[:5])}{' ...' if len(names) > 5 else ''}"
            for word, names in (("no longer observed:", gone), ("observed now:", new))
            if names
        )
        raise PolicyError(
            f"{path} was trained on {len(header.features)} features, and this version shows {len(now)} "
            f"({what or 'in another order'}): train it again"
        )
    return header


def refuse_other_choices(name: str, trained: ActionGrid, grid: ActionGrid) -> None:
    """Raise PolicyError unless the two have exactly the same choices of c and n."""
    for key in ("candidate_choices", "budget_choices"):
        its, ours = getattr(trained, key), getattr(grid, key)
        if its != ours:
            raise PolicyError(
                f"policy {name!r} was trained for actions.{key}={list(its)}, not {list(ours)}: set actions.{key} to "
                "the former, or train one for the latter"
            )


def shipped_policies() -> list[str]:
    """Names of the policies in `controllers/policies`."""
    return sorted(path.stem for path in POLICIES_FOLDER.glob("*.npz"))
