"""Measures a real engine and makes a simulated one of it: `python -m runs.profile engine=torch_tiny`.

Composes the configuration (conf/profile.yaml) and writes into the run folder (`hydra.run.dir`): `iterations.parquet`
(one row a measured iteration), `table.json` (latency table), `card.json` (held-out errors), `acceptance.jsonl` and
`agreement.npz` (what speculation got), `tokens_per_iteration.json`, `provenance.json`, and `engine.yaml`, which
`engine=PATH` accepts in every app. `visits.jsonl` holds every timing as it was made: the same command goes on from it.

`python -m runs.profile --from-vllm-bench FILE... base=TABLE` (also `from_vllm_bench=[FILE,...]`) measures nothing: it
reads what `vllm bench serve` reported of a server (conf/from_vllm_bench.yaml), fits a few factors on the base table,
and writes `table.json`, `card.json` (errors on runs left out), `engine.yaml`, and `agreement.yaml` where the server
speculated.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from runs import mistakes
from runs.from_vllm_bench import calibration
from runs.from_vllm_bench.calibration import BenchCalibration, Calibrated
from runs.from_vllm_bench.factors import factor_table
from runs.profiling import ENGINE, Profile, Result
from runs.progress import progress

log = logging.getLogger("profile")

OPTION, KEY = "--from-vllm-bench", "from_vllm_bench"


def job(config: DictConfig) -> None:
    """One Hydra job. Exits with 2 and one message on what the user can fix, with 130 when interrupted."""
    out = Path(HydraConfig.get().runtime.output_dir)
    with mistakes.ending(log, "interrupted: the same command goes on from here"):
        profile = mistakes.instantiate(config, Profile)
        with mistakes.named():
            _say(profile.run(out, progress), out)


def _say(result: Result, out: Path) -> None:
    table = Table(title=f"Held-out iteration times, mean absolute error in %, {len(result.measured)} points")
    groups = list(result.card["linear"])
    for heading in ("", *groups):
        table.add_column(heading, justify="left" if heading == "" else "right")
    for prediction, errors in result.card.items():
        table.add_row(prediction, *(f"{100 * errors[group]:.1f}" for group in groups))
    console = Console(width=max(100, Console().width))
    console.print(table)
    gains = "  ".join(f"c={c}: {gain:.2f}" for c, gain in result.tokens_per_iteration.items())
    console.print(f"Tokens per iteration  {gains}")
    log.info("engine=%s simulates this engine in every app", out / ENGINE)


def bench_job(config: DictConfig) -> None:
    """One Hydra job of `--from-vllm-bench`. Exits as `job` does."""
    out = Path(HydraConfig.get().runtime.output_dir)
    with mistakes.ending(log, "interrupted: nothing was written"):
        wanted = mistakes.instantiate(config, BenchCalibration)
        with mistakes.named():
            _say_bench(wanted.run(out, progress), out)


def _say_bench(calibrated: Calibrated, out: Path) -> None:
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


def bench_arguments(arguments: Sequence[str]) -> list[str] | None:
    """The command line of `--from-vllm-bench FILE...` or `from_vllm_bench=FILES` in Hydra's words; None without it.

    The files are the words behind the option that end in `.json` or name a file.
    """
    rest = list(arguments)
    if OPTION in rest:
        place = rest.index(OPTION)
        end = place + 1
        while end < len(rest) and _names_a_result(rest[end]):
            end += 1
        quoted = ("'" + word.replace("\\", "\\\\").replace("'", "\\'") + "'" for word in rest[place + 1 : end])
        return [*rest[:place], f"files=[{','.join(quoted)}]", *rest[end:]]
    if any(word.startswith(f"{KEY}=") for word in rest):
        return [f"files={word.removeprefix(f'{KEY}=')}" if word.startswith(f"{KEY}=") else word for word in rest]
    return None


def _names_a_result(word: str) -> bool:
    # A setting may end as a result does: base=table.json.
    return (word.endswith(".json") and "=" not in word) or Path(word).is_file()


measure = hydra.main(version_base=None, config_path="../conf", config_name="profile")(job)
calibrate = hydra.main(version_base=None, config_path="../conf", config_name="from_vllm_bench")(bench_job)


def main() -> None:
    """Measure, or with `--from-vllm-bench` calibrate."""
    arguments = bench_arguments(sys.argv[1:])
    if arguments is None:
        measure()
    else:
        sys.argv[1:] = arguments
        calibrate()


if __name__ == "__main__":
    main()
