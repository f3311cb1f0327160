"""Rows of metrics of a training run, in a CSV and in W&B."""

import csv
import io
import json
import logging
import math
import os
import shutil
from pathlib import Path
from typing import Any

from engine.files import read_json, reading, write_whole
from runs.tracking import Tracking

log = logging.getLogger(__name__)

METRICS = "metrics.csv"
IDENTITY = "wandb.json"
STEP = "train/env_steps"

Row = dict[str, float]


class Metrics:
    """Rows of metrics by environment steps, rewritten whole so that a file never holds half a row, nor one twice.

    After a kill the rows begin with those of the checkpoint (`resume`); what was written after it is overwritten as
    training comes by again. W&B then gets all rows anew under their steps: what a kill kept it from writing is made up
    for, and of what it has it drops the repetition (offline: the files of the killed run are removed).
    """

    def __init__(self, folder: Path, tracking: Tracking, name: str, config: dict[str, Any]) -> None:
        self.rows: list[Row] = []
        self._folder = folder
        self._run: Any = None
        if tracking.enabled:
            self._begin(tracking, name, config)

    def _begin(self, tracking: Tracking, name: str, config: dict[str, Any]) -> None:
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        identity = self._folder / IDENTITY
        with reading(identity, "remove it"):
            known = read_json(identity)["id"] if identity.is_file() else None
        if known is not None:
            for killed in (self._folder / "wandb").glob(f"offline-run-*-{known}"):
                shutil.rmtree(killed)
        try:
            self._run = wandb.init(
                project=tracking.project,
                mode="offline" if tracking.mode == "offline" else "online",
                dir=str(self._folder),
                id=known,
                resume=None if known is None else "allow",
                name=name,
                job_type="train",
                config=config,
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True),
            )
            for prefix in ("train", "eval", "serving"):
                self._run.define_metric(f"{prefix}/*", step_metric=STEP)
        except wandb.Error as error:
            log.warning("nothing is logged to Weights & Biases (%s); logger=none turns it off", error)
            self._run = None
            return
        write_whole(identity, json.dumps({"id": self._run.id}).encode())

    def add(self, row: Row) -> None:
        """Append a row; write the CSV, and tell W&B."""
        self.rows.append(row)
        self._write()
        self._tell(row)

    def resume(self, rows: list[Row]) -> None:
        """Go on from the rows of a checkpoint."""
        self.rows = rows
        self._write()
        for row in rows:
            self._tell(row)

    def _tell(self, row: Row) -> None:
        if self._run is not None:
            # A row that waits for the next step would be written after the summary, and into it.
            finite = {key: value for key, value in row.items() if math.isfinite(value)}
            self._run.log(finite, step=int(row[STEP]), commit=True)

    def _write(self) -> None:
        """Write the CSV as the rows are."""
        columns = sorted({key for row in self.rows for key in row}, key=lambda key: (key != STEP, key))
        text = io.StringIO()
        writer = csv.DictWriter(text, columns, lineterminator="\n", restval="")
        writer.writeheader()
        for row in self.rows:
            writer.writerow({key: f"{value:.6g}" if key != STEP else f"{value:.0f}" for key, value in row.items()})
        write_whole(self._folder / METRICS, text.getvalue().encode())

    def finish(self, summary: dict[str, Any]) -> None:
        """Tell W&B the outcome."""
        if self._run is not None:
            for key, value in summary.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    self._run.summary[key] = value
            self._run.finish()
            self._run = None
