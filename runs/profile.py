"""Measures a real engine and makes a simulated one of it: `python -m runs.profile engine=torch_tiny`.

Composes the configuration (conf/profile.yaml) and writes into the run folder (`hydra.run.dir`): `iterations.parquet`
(one row a measured iteration), `table.json` (latency table), `card.json` (held-out errors), `acceptance.jsonl` and
`agreement.npz` (what speculation got), `tokens_per_iteration.json`, `provenance.json`, and `engine.yaml`, which
`engine=PATH` accepts in every app. `visits.jsonl` holds every timing as it was made: the same command goes on from it.
"""

import logging
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig
from rich.console import Console
from rich.table import Table

from runs import mistakes
from runs.profiling import ENGINE, Profile, Result
from runs.progress import progress

log = logging.getLogger("profile")


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


main = hydra.main(version_base=None, config_path="../conf", config_name="profile")(job)

if __name__ == "__main__":
    main()
