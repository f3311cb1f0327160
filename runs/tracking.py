"""Weights & Biases: a finished run's summary, configuration and curves over time windows."""

import logging
import math
import os
from pathlib import Path
from typing import Annotated, Any, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import BaseModel, ConfigDict, Field

log = logging.getLogger(__name__)


class Tracking(BaseModel):
    """Whether and how a run is logged to Weights & Biases.

    Args:
        mode: `offline` writes files into the run folder and touches no network, `online` uploads, `none` does nothing
            and does not even import wandb.
        project: W&B project.
        window_s: length of the time windows of the curves, s.
    """

    model_config = ConfigDict(extra="forbid", frozen=True)

    mode: Literal["offline", "online", "none"] = "none"
    project: Annotated[str, Field(min_length=1)] = "governor"
    window_s: Annotated[float, Field(gt=0.0, allow_inf_nan=False)] = 30.0

    @property
    def enabled(self) -> bool:
        """Whether anything is logged."""
        return self.mode != "none"

    def record(
        self,
        folder: Path,
        config: dict[str, Any],
        summary: dict[str, Any],
        requests: dict[str, NDArray[Any]],
        iterations: NDArray[np.void],
    ) -> None:
        """Log a finished run; its W&B files go to `folder`. A failure to log is a warning: the run itself stands."""
        if not self.enabled:
            return
        os.environ.setdefault("WANDB_SILENT", "true")
        import wandb

        identity = summary["run"]
        try:
            run = wandb.init(
                project=self.project,
                mode="offline" if self.mode == "offline" else "online",
                dir=str(folder),
                name=f"{identity['label']} · {identity['scenario']} · seed {identity['seed']}",
                group=f"{identity['engine']} · {identity['scenario']}",
                job_type="evaluate",
                config={**config, "identity": identity},
                settings=wandb.Settings(silent=True, console="off", x_disable_stats=True, x_disable_meta=True),
            )
            run.define_metric("serving/time_s")
            run.define_metric("serving/*", step_metric="serving/time_s")
            for point in windows(requests, iterations, self.window_s, identity["ttft_target_s"]):
                run.log({f"serving/{name}": value for name, value in point.items()})
            for name, value in summary.items():
                if isinstance(value, int | float) and math.isfinite(value):
                    run.summary[name] = value
            run.finish()
        except wandb.Error as error:
            log.warning("nothing was logged to Weights & Biases (%s); logger=none turns it off", error)


def windows(
    requests: dict[str, NDArray[Any]], iterations: NDArray[np.void], window_s: float, ttft_target_s: float
) -> list[dict[str, float]]:
    """The run's curves: one point per time window, at its end; a value that a window does not have is left out.

    Requests count in the window they arrive in; c, n and the batch are means over the iterations that end in it,
    weighted by their duration.
    """
    arrival = requests["arrival_s"]
    index = np.floor(arrival / window_s).astype(np.int64)
    length = int(index.max()) + 1
    attained = requests["first_token_s"] <= arrival + ttft_target_s
    columns = {
        "request_rate_rps": np.bincount(index, minlength=length) / window_s,
        "ttft_attainment": _means(index, attained.astype(np.float64), np.ones(arrival.size), length),
        "ttft_s": _means(index, requests["ttft_s"], np.ones(arrival.size), length),
        "tpot_s": _means(index, requests["tpot_s"], np.ones(arrival.size), length),
    }
    if iterations.size:
        place = np.floor(iterations["end_s"] / window_s).astype(np.int64)
        kept = place < length
        weight = (iterations["end_s"] - iterations["start_s"])[kept]
        for name, source in (
            ("candidates", "candidates"), ("token_budget", "token_budget"), ("batch", "num_decodes")
        ):  # fmt: skip
            columns[name] = _means(place[kept], iterations[source][kept].astype(np.float64), weight, length)
    return [
        {"time_s": (w + 1) * window_s} | {name: float(v[w]) for name, v in columns.items() if np.isfinite(v[w])}
        for w in range(length)
    ]


def _means(
    index: NDArray[np.int64], values: NDArray[np.float64], weights: NDArray[np.float64], length: int
) -> NDArray[np.float64]:
    """Weighted mean of the finite values in each of `length` windows; NaN where there is none."""
    finite = np.isfinite(values)
    index, values, weights = index[finite], values[finite], weights[finite]
    total = np.bincount(index, weights=values * weights, minlength=length)
    with np.errstate(invalid="ignore", divide="ignore"):
        return total / np.bincount(index, weights=weights, minlength=length)
