"""Measures a real engine and makes a simulated one of it: `python -m runs.profile engine=torch_tiny`.

Composes the configuration (conf/profile.yaml) and writes into the run folder (`hydra.run.dir`): `iterations.parquet`
(one row a measured iteration, its provenance in the file), `table.json` (latency table), `card.json` (held-out errors),
`acceptance.jsonl` and `agreement.npz` (what speculation got), `tokens_per_iteration.json`, `provenance.json`,
`machine.json` (what only this machine can say), and `engine.yaml`, which `engine=PATH` accepts in every app.
`visits.jsonl` holds every timing as it was made: the same command goes on from it. `device=cuda` is short for
`engine.device=cuda`.

Where Hydra or pydantic is missing the same command runs without them (`runs.bare`): torch, transformers, numpy, numba
and scikit-learn are enough, pyarrow but for `iterations.parquet` and `engine.yaml`.

`python -m runs.profile --finish FOLDER` measures nothing: in a folder that was measured elsewhere it writes what was
missing there, and everything that names a place anew.

`python -m runs.profile --from-vllm-bench FILE... base=TABLE` (also `from_vllm_bench=[FILE,...]`) measures nothing: it
reads what `vllm bench serve` reported of a server (conf/from_vllm_bench.yaml), fits a few factors on the base table,
and writes `table.json`, `card.json` (errors on runs left out), `engine.yaml`, and `agreement.yaml` where the server
speculated.
"""

import importlib.util
import sys
from collections.abc import Sequence
from pathlib import Path

BENCH, BENCH_KEY = "--from-vllm-bench", "from_vllm_bench"
FINISH = "--finish"
APP_PACKAGES = ("hydra", "omegaconf", "pydantic")
"""What the Hydra apps need and a GPU box may not have."""


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


def main() -> None:
    """Measure; or finish a folder, or calibrate, as the command line says."""
    arguments = sys.argv[1:]
    missing = [package for package in APP_PACKAGES if importlib.util.find_spec(package) is None]
    bench = bench_arguments(arguments)
    if missing and {"-h", "--help"} & set(arguments):
        print(__doc__)
    elif FINISH in arguments or (missing and bench is None):
        from runs import bare

        bare.main(profile_arguments(arguments))
    elif missing:
        sys.exit(f"{BENCH} needs {', '.join(missing)}, which is not installed here")
    else:
        from runs import profile_apps

        sys.argv[1:] = profile_arguments(arguments) if bench is None else bench
        (profile_apps.measure if bench is None else profile_apps.calibrate)()


if __name__ == "__main__":
    main()
