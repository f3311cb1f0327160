"""Exports a schedule: `python -m runs.export engine=vicuna_7b_a100 workload=poisson_lmsys controller=analytic`.

From what a controller chooses under a workload, the best c by batch size and the best token budget, for
`format=vllm|sglang|trtllm|llamacpp`. Composes the configuration (conf/export.yaml) and writes into the run folder
(`hydra.run.dir`) the engine's own files, `command.sh`, `controller.yaml` (what plays the schedule back:
`controller=PATH` in every app) and `schedule.json` with the figures; prints the command line to paste.
"""

import logging
import math
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from engine.config import EngineConfig
from runs import mistakes
from runs.exporting.export import EXPORTED, LEAST_SHARE, Export, Exported
from runs.progress import progress
from runs.reporting.statistics import PairedDifference

log = logging.getLogger("export")


def job(config: DictConfig) -> float:
    """One Hydra job; returns the mean objective of what was exported.

    A single run exits with 2 and one message on what the user can fix, with 130 when interrupted.
    """
    out = Path(HydraConfig.get().runtime.output_dir)
    with mistakes.ending(log, "interrupted: nothing was written", out):
        export = mistakes.instantiate(config, Export)
        _warn(export)
        with mistakes.named():
            exported = export.run(out, progress)
            _say(export, exported, out)
        return exported.mean(EXPORTED, "objective")


def _warn(export: Export) -> None:
    assert isinstance(export.engine, EngineConfig), "one that runs for real is refused"
    if export.format == "sglang" and export.engine.prefill in ("chunked", "whole"):
        log.warning(
            "SGLang runs prompts and decodes in batches of their own while it speculates: engine.prefill=first (or "
            "turns) is nearer to it than engine.prefill=%s",
            export.engine.prefill,
        )


def _say(export: Export, exported: Exported, out: Path) -> None:
    schedule = exported.schedule
    seeds = len(export.seeds)
    table = Table(
        title=f"{export.engine.name}, {export.workload.scenario}: means over {seeds} seeds that nothing was chosen on",
        title_justify="left",
    )
    headings = ("", "objective", "TPOT, ms", "TTFT attained, %", "exported against it: objective", "TPOT")
    for heading in headings:
        table.add_column(heading, justify="left" if heading == "" else "right")
    for who, label in exported.labels.items():
        figures = (
            f"{exported.mean(who, 'objective'):.4f}",
            f"{1e3 * exported.mean(who, 'tpot_mean_s'):.2f}",
            f"{100 * exported.mean(who, 'ttft_attainment'):.1f}",
        )
        gains = exported.gains.get(who, {})
        against = [_relative(gains.get(metric)) for metric in ("objective", "tpot_mean_s")]
        name = f"exported: {label}" if who == EXPORTED else f"{who}: {label}" if who != label else label
        table.add_row(name, *figures, *against)
    console = Console(width=max(120, Console().width))
    console.print(table)
    entries = "  ".join(
        f"{low}-{high}: {candidates} ({100 * share:.0f} %{'' if share >= LEAST_SHARE else ', predicted'})"
        for (low, high, candidates), share in zip(schedule.entries, exported.share, strict=True)
    )
    console.print(
        f"c by batch size (share of decode time)  {entries}\ntokens an iteration  {schedule.total_budget}\n",
        highlight=False,
    )
    print(exported.command)
    for warning in exported.warnings:
        log.warning(warning)
    log.info("written to %s", out)


def _relative(paired: PairedDifference | None) -> str:
    """How much lower the metric is, in percent, with its interval."""
    if paired is None or math.isnan(paired.ratio):
        return ""
    interval = ""
    if not math.isnan(paired.ratio_low):
        interval = f" [{100 * (paired.ratio_low - 1):+.1f}, {100 * (paired.ratio_high - 1):+.1f}]"
    return f"{100 * (paired.ratio - 1):+.1f}{interval} %"


main = mistakes.app("export")(job)

if __name__ == "__main__":
    main()
