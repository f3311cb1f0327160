"""The app behind `python -m runs.profile --from-vllm-bench`: calibration from the results of `vllm bench serve`."""

import logging
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from runs import mistakes
from runs.from_vllm_bench import calibration
from runs.from_vllm_bench.calibration import BenchCalibration, Calibrated
from runs.from_vllm_bench.factors import factor_table
from runs.progress import progress

log = logging.getLogger("profile")


def job(config: DictConfig) -> None:
    """One Hydra job. Exits with 2 and one message on what the user can fix, with 130 when interrupted."""
    out = Path(HydraConfig.get().runtime.output_dir)
    with mistakes.ending(log, "interrupted: nothing was written", out):
        wanted = mistakes.instantiate(config, BenchCalibration)
        with mistakes.named():
            _say(wanted.run(out, progress), out)


def _say(calibrated: Calibrated, out: Path) -> None:
    table = Table(title="Simulated against reported, in % of the reported: TPOT, TTFT (means)", title_justify="left")
    headings = ("run", "load", "c", "TPOT, ms", "TTFT, ms", "base table", "fitted", "fitted without it")
    for place, heading in enumerate(headings):
        table.add_column(heading, justify="left" if place < 2 else "right")
    for i, run in enumerate(calibrated.runs):
        figures = (f"{1e3 * run.observed[key]:.2f}" for key in ("tpot_mean_s", "ttft_mean_s"))
        errors = (calibrated.base, calibrated.fitted, calibrated.left_out or [{}] * len(calibrated.runs))
        table.add_row(run.name, run.load, str(run.candidates), *figures, *(_pair(column[i]) for column in errors))
    Console(width=max(120, Console().width)).print(table)
    factors = "  ".join(f"{name} {value:.3g}" for name, value in factor_table(calibrated.factors).items())
    log.info("factors on the base's times: %s", factors)
    if not calibrated.left_out:
        log.warning("one run was given: nothing is left to check the fit on; give runs at other loads too")
    log.info("engine=%s simulates this engine in every app", out / calibration.ENGINE)


def _pair(errors: dict[str, float]) -> str:
    return ", ".join(f"{100 * errors[key]:+.1f}" for key in ("tpot_mean_s", "ttft_mean_s")) if errors else ""


calibrate = mistakes.app("from_vllm_bench")(job)
