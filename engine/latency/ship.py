"""Make a measured profile one of the shipped engines.

    python -m engine.latency.ship runs/outputs/profile/torch_vicuna_7b --name vicuna_7b_h200

From the folder that `runs.profile` left: `engine/latency/tables/NAME.json`, the measured iterations beside it as
`NAME.parquet`, and `conf/engine/NAME.yaml`, so that `engine=NAME` works in every app. Deterministic: the same profile
gives the same bytes.
"""

from __future__ import annotations

import argparse
import re
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import yaml

from engine.command import run
from engine.files import read_json, reading, write_whole
from engine.latency.model import TABLES_FOLDER, LatencyModel
from engine.latency.table_file import dump

ENGINES_FOLDER = Path(__file__).resolve().parents[2] / "conf" / "engine"
PATTERN = "vicuna_7b_a100.yaml"
"""Shipped engine whose file sets the order of settings and their comments."""

MEASURED = ("name", "latency", "max_num_seqs", "max_model_len", "block_size", "watermark", "num_kv_blocks")
"""Settings given by a profile."""

HELD_OUT = "latency table"
"""Entry of the profile's card that is the table's own held-out error."""


class ShipError(ValueError):
    """The profile cannot be shipped; the message names file or option and the next step."""


def table_document(folder: Path, name: str) -> dict[str, Any]:
    """Content of the table file: the profile's table with a name, the measured engine and held-out errors.

    Raises ShipError when the folder is no finished profile.
    """
    document = _json(folder / "table.json")
    provenance = document["provenance"]
    errors = {key: round(error, 5) for key, error in _json(folder / "card.json")[HELD_OUT].items()}
    engine = provenance["engine"]
    shipped = {
        "schema": document["schema"],
        "name": name,
        "model": _model(engine["target"]),
        "drafter_model": _drafter(engine),
        "gpu": provenance["device"],
        **{key: part for key, part in document.items() if key not in ("schema", "name", "provenance")},
        "provenance": {**provenance, "held_out_error": errors},
    }
    LatencyModel.from_document(shipped, str(folder / "table.json"))
    return shipped


def engine_yaml(folder: Path, name: str, pattern: str) -> str:
    """The engine's file: `pattern`, another's, with the settings that were measured in place of its own.

    Raises ShipError when the folder is no finished profile.
    """
    provenance = _json(folder / "table.json")["provenance"]
    engine = provenance["engine"]
    settings = _settings(folder / "engine.yaml") | {"name": name, "latency": name}
    given = {key: str(settings[key]) for key in MEASURED}
    models = f"{_model(engine['target'])} with a {_drafter(engine)} drafter"
    lines = [f"# {models} on one {provenance['device']}, measured whole by runs.profile."]
    for line in pattern.splitlines():
        key = line.partition(":")[0]
        if key in given:
            line = _with_value(line, given[key])
        if not line.startswith("#"):
            lines.append(line)
    return "\n".join(lines) + "\n"


def _with_value(line: str, value: str) -> str:
    """A line `key: value  # comment` with another value, its comment where it was if there is room."""
    setting, hash_, comment = line.partition("#")
    start = f"{setting.partition(':')[0]}: {value}"
    return f"{start} ".ljust(len(setting)) + hash_ + comment if hash_ else start


def ship(folder: Path, name: str, tables: Path, engines: Path, *, replace: bool = False) -> list[Path]:
    """Write the table, its iterations and the engine's file; returns their paths.

    Raises ShipError when the folder is no finished profile, or there is an engine of that name and not `replace`.
    """
    if not re.fullmatch(r"[a-z0-9_]+", name):
        raise ShipError(f"--name {name}: a name is lower-case letters, digits and underscores, such as vicuna_7b_h200")
    table, rows, engine = tables / f"{name}.json", tables / f"{name}.parquet", engines / f"{name}.yaml"
    standing = [str(path) for path in (table, rows, engine) if path.exists()]
    if standing and not replace:
        raise ShipError(f"{', '.join(standing)}: already exists; choose another --name, or give --replace")
    document = dump(table_document(folder, name))
    text = engine_yaml(folder, name, (ENGINES_FOLDER / PATTERN).read_text(encoding="utf-8"))
    measured = folder / "iterations.parquet"
    if not measured.is_file():
        raise _unfinished(measured)
    write_whole(table, document.encode())
    partial = rows.with_name(f".{rows.name}.partial")
    shutil.copyfile(measured, partial)
    partial.replace(rows)
    # The engine's file is written last, so that its table always exists.
    write_whole(engine, text.encode())
    return [table, rows, engine]


def _model(source: str) -> str:
    """`vicuna_7b` of `shape:vicuna_7b`, and the last part of a path or a hub id."""
    return source.removeprefix("shape:").rstrip("/").rpartition("/")[2]


def _drafter(engine: dict[str, Any]) -> str:
    """The drafter's model, or the kind of drafter without a model."""
    return _model(engine["drafter_model"]) if engine["drafter"] == "model" else str(engine["drafter"])


def _settings(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise _unfinished(path)
    with reading(path):
        found: dict[str, Any] = yaml.safe_load(path.read_text(encoding="utf-8"))
    return found


def _json(path: Path) -> dict[str, Any]:
    if not path.is_file():
        raise _unfinished(path)
    found: dict[str, Any] = read_json(path)
    return found


def _unfinished(path: Path) -> ShipError:
    return ShipError(
        f"{path}: no such file; give the folder of a finished python -m runs.profile (where it says that pyarrow is "
        "missing, install it and give its command again)"
    )


def main(arguments: Sequence[str] | None = None) -> None:
    """Command line. Raises ShipError."""
    parser = argparse.ArgumentParser(description="Make a measured profile one of the shipped engines.")
    parser.add_argument("profile", type=Path, help="folder that runs.profile left")
    parser.add_argument("--name", required=True, help="of the engine: vicuna_7b_h200")
    parser.add_argument("--tables", type=Path, default=TABLES_FOLDER, help="folder for the table")
    parser.add_argument("--engines", type=Path, default=ENGINES_FOLDER, help="folder for the engine's yaml")
    parser.add_argument("--replace", action="store_true", help="replace an engine of that name")
    options = parser.parse_args(arguments)
    written = ship(options.profile, options.name, options.tables, options.engines, replace=options.replace)
    for path in written:
        print(f"{path}: {path.stat().st_size:,} bytes")


if __name__ == "__main__":
    run(main)
