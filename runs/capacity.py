"""Searches a capacity: `python -m runs.capacity engine=vicuna_7b_a100 workload=poisson_lmsys controller=analytic`.

The highest request rate at which 90 % of the requests meet both targets, seed by seed, by bisection on
`workload.rate_scale`. Composes the configuration (conf/capacity.yaml) and writes into the run folder (`hydra.run.dir`)
`capacity.json` and `probes.jsonl`, every run as it was made: the same command goes on from it.
"""

import logging
import math
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from runs import mistakes
from runs.capacity_search import CAPACITY, Capacity, Found
from runs.progress import progress

log = logging.getLogger("capacity")


def job(config: DictConfig) -> float:
    """One Hydra job; returns the capacity in requests/s.

    A single run exits with 2 and one message on what the user can fix, with 130 when interrupted.
    """
    out = Path(HydraConfig.get().runtime.output_dir)
    with mistakes.ending(log, "interrupted: the same command goes on from here", out):
        capacity = mistakes.instantiate(config, Capacity)
        with mistakes.named():
            found = capacity.run(out, progress)
        _say(capacity, found, out)
        return found.rps[0]


def _say(capacity: Capacity, found: Found, out: Path) -> None:
    targets = f"TTFT {capacity.slo.ttft_target:g} s, TPOT {1e3 * capacity.slo.tpot_target:g} ms"
    table = Table(
        title=f"{found.label} on {capacity.engine.name}, {capacity.workload.scenario}: highest rate at which "
        f"{100 * capacity.share:g} % of requests meet {targets}",
        title_justify="left",
    )
    for heading in ("seed", "rate_scale", "requests/s", "meet both, %", "TTFT, %", "TPOT, %", "fails at rate_scale"):
        table.add_column(heading, justify="right")
    for bracket in found.brackets:
        best = bracket.passes
        shares = (f"{100 * value:.1f}" for value in (best.slo_attainment, best.ttft_attainment, best.tpot_attainment))
        rates = (f"{best.rate_scale:.4g}", f"{best.request_rate_rps:.3f}")
        table.add_row(str(best.seed), *rates, *shares, f"{bracket.fails.rate_scale:.4g}")
    Console(width=max(110, Console().width)).print(table)
    log.info("capacity %s requests/s, rate_scale %s", _interval(found.rps), _interval(found.rate_scale))
    log.info("written to %s", out / CAPACITY)


def _interval(figures: tuple[float, float, float]) -> str:
    mean, low, high = figures
    return f"{mean:.3f}" + ("" if math.isnan(low) else f" [{low:.3f}, {high:.3f}]")


main = mistakes.app("capacity")(job)

if __name__ == "__main__":
    main()
