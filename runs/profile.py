"""Measures a real engine and makes a simulated one of it: `python -m runs.profile engine=torch_tiny`.

Composes the configuration (conf/profile.yaml) and writes into the run folder (`hydra.run.dir`): `iterations.parquet`
(one row a measured iteration, its provenance in the file), `table.json` (latency table), `card.json` (held-out errors),
`acceptance.jsonl` and `agreement.npz` (what speculation got), `tokens_per_iteration.json`, `provenance.json`, and
`engine.yaml`, which `engine=PATH` accepts in every app. `visits.jsonl` holds every timing as it was made: the same
command goes on from it. `device=cuda` is short for `engine.device=cuda`.

Needs torch, transformers, numpy, numba, scikit-learn, hydra-core, omegaconf and pydantic; pyarrow for
`iterations.parquet` and `engine.yaml` alone.

`python -m runs.profile --from-vllm-bench FILE... base=TABLE` (also `from_vllm_bench=[FILE,...]`) measures nothing: it
reads what `vllm bench serve` reported of a server (conf/from_vllm_bench.yaml), fits a few factors on the base table,
and writes `table.json`, `card.json` (errors on runs left out), `engine.yaml`, and `agreement.yaml` where the server
speculated.
"""

import logging
import sys
from collections.abc import Sequence
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from runs import mistakes
from runs.measured_folder import ENGINE, Result
from runs.profiling import Profile
from runs.progress import progress

log = logging.getLogger("profile")

BENCH, BENCH_KEY = "--from-vllm-bench", "from_vllm_bench"


def job(config: DictConfig) -> None:
    """One Hydra job. Exits with 2 and one message on what the user can fix, with 130 when interrupted."""
    out = Path(HydraConfig.get().runtime.output_dir)
    with mistakes.ending(log, "interrupted: the same command goes on from here", out):
        profile = mistakes.instantiate(config, Profile)
        with mistakes.named():
            _say(profile.run(out, progress), out)


measure = mistakes.app("profile")(job)


def bench_arguments(arguments: Sequence[str]) -> list[str] | None:
    """The command line of `--from-vllm-bench FILE...` or `from_vllm_bench=FILES` in Hydra's words; None without it.

    The files are the words behind the option that end in `.json` or name a file.
    """
    rest = list(arguments)
    if BENCH in rest:
        place = rest.index(BENCH)
        end = place + 1
        while end < len(rest) and _names_a_result(rest[end]):
            end += 1
        quoted = ("'" + word.replace("\\", "\\\\").replace("'", "\\'") + "'" for word in rest[place + 1 : end])
        return [*rest[:place], f"files=[{','.join(quoted)}]", *rest[end:]]
    if any(word.startswith(f"{BENCH_KEY}=") for word in rest):
        return [
            f"files={word.removeprefix(f'{BENCH_KEY}=')}" if word.startswith(f"{BENCH_KEY}=") else word for word in rest
        ]
    return None


def profile_arguments(arguments: Sequence[str]) -> list[str]:
    """The command line with the short word `device=` written out."""
    return [f"engine.{word}" if word.startswith("device=") else word for word in arguments]


def _names_a_result(word: str) -> bool:
    # A setting may end as a result does: base=table.json.
    return (word.endswith(".json") and "=" not in word) or Path(word).is_file()


def _say(result: Result, folder: Path) -> None:
    """Print held-out errors and what speculation got; log what can be done with the folder now."""
    groups = list(result.card["linear"])
    rows = [["", *groups]]
    rows += [[name, *(f"{100 * errors[group]:.1f}" for group in groups)] for name, errors in result.card.items()]
    widths = [max(len(row[i]) for row in rows) for i in range(len(rows[0]))]
    print(f"Held-out iteration times, mean absolute error in %, {len(result.measured)} points")
    for first, *others in rows:
        print(first.ljust(widths[0]), *(cell.rjust(width) for cell, width in zip(others, widths[1:], strict=True)))
    gains = "  ".join(f"c={c}: {gain:.2f}" for c, gain in result.tokens_per_iteration.items())
    print(f"Tokens per iteration  {gains}")
    if result.missing:
        log.warning(
            "%s not written: pyarrow is missing; install it and give the same command again, it goes on from here",
            " and ".join(result.missing),
        )
    else:
        log.info("engine=%s simulates this engine in every app", folder / ENGINE)


def main() -> None:
    """Measure, or calibrate from a benchmark's results, as the command line says."""
    arguments = sys.argv[1:]
    bench = bench_arguments(arguments)
    if bench is None:
        sys.argv[1:] = profile_arguments(arguments)
        measure()
    else:
        # Its tables need more packages than measuring does.
        from runs.profile_from_bench import calibrate

        sys.argv[1:] = bench
        calibrate()


if __name__ == "__main__":
    main()
