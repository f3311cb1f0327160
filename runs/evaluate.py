"""Evaluates one controller: `python -m runs.evaluate controller=analytic workload=trace workload.path=FILE ...`.

Composes the configuration (conf/evaluate.yaml), checks it, serves the workload, and writes `config.yaml`,
`summary.json`, `requests.parquet` and, with `record_iterations=true`, `iterations.parquet` into the run folder
(`hydra.run.dir`), beside `evaluate.log`; a real engine also leaves `outputs.jsonl`. Nothing of these is written before
the run has finished.

`-m` sweeps (conf/experiment), with one folder a job in `hydra.sweep.dir`. A job that fails leaves `failure.json`; the
others go on, and the sweep ends with 1. A sweep into the same `hydra.sweep.dir` again keeps the finished runs whose
configuration, files named in it and code are the same (`resume`). Hydra's sweepers get `optimized_metric` of each job.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, ListConfig, OmegaConf
from yaml import YAMLError

from runs import folder, mistakes
from runs.code import code_digest
from runs.evaluation import Evaluation, Result
from runs.inputs import file_digests
from runs.metric import optimized
from runs.progress import progress
from runs.serving import overload

log = logging.getLogger("evaluate")

NOT_DECIDING = ("resume", "optimized_metric", "logger")
"""Keys that change nothing in a run's figures."""


def evaluate(config: DictConfig, out: Path, choices: dict[str, str]) -> Result:
    """Run what `config` says and write the run folder. Raises MistakeError for what the user can fix."""
    evaluation = mistakes.instantiate(config, Evaluation)
    _warn(evaluation)
    plain = _plain(config)
    inputs = file_digests(_deciding(plain))
    with progress() as on_progress, mistakes.named():
        result = evaluation.run(on_progress)
    # A choice may be the path of a file.
    result.summary["run"]["workload"] = Path(choices.get("workload", result.summary["run"]["workload"])).stem
    result.summary["run"]["inputs"] = inputs
    resolved = OmegaConf.to_yaml(config, resolve=True)
    iterations = result.iterations if evaluation.record_iterations else None
    outputs = None if result.outputs is None else [asdict(output) for output in result.outputs]
    folder.write_run(out, resolved, result.summary, result.requests, iterations, outputs)
    evaluation.logger.record(out, plain, result.summary, result.requests, result.iterations)
    return result


def finished(config: DictConfig, out: Path) -> dict[str, Any] | None:
    """The summary in the folder, if it is of a run that this one would repeat: same settings, input files and code."""
    try:
        # What is written does not resolve again.
        settings = _plain(OmegaConf.load(out / folder.CONFIG), resolve=False)
        summary = json.loads((out / folder.SUMMARY).read_text(encoding="utf-8"))
        made = (_deciding(settings), summary["run"]["inputs"], summary["run"]["code"])
    except (OSError, ValueError, KeyError, TypeError, AttributeError, YAMLError):
        return None
    wanted = _deciding(_plain(OmegaConf.create(OmegaConf.to_yaml(config, resolve=True)), resolve=False))
    return summary if made == (wanted, file_digests(wanted), code_digest()) else None


def _plain(config: DictConfig | ListConfig, resolve: bool = True) -> dict[str, Any]:
    plain = OmegaConf.to_container(config, resolve=resolve)
    if not isinstance(plain, dict):
        raise ValueError("a configuration is a mapping")
    return {str(key): value for key, value in plain.items()}


def _deciding(settings: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings.items() if key not in NOT_DECIDING}


def _warn(evaluation: Evaluation) -> None:
    for name, what in (
        ("ttft_target", "target, %s s: attainment"),
        ("tpot_target", "target, %s s: the objective"),
        ("violation", "price, %s: the objective"),
        ("lateness", "price, %s: the objective"),
    ):
        own, reported = getattr(evaluation.controller, name, None), getattr(evaluation.slo, name)
        if own is not None and own != reported:
            said = what % f"controller.{name}={own:g}"
            log.warning("slo.%s=%g is not the controller's own %s is counted against the former", name, reported, said)


def _say(result: Result, out: Path) -> None:
    summary = result.summary
    log.info(
        "%s on %s, %s: TPOT %.2f ms, TTFT p99 %.3f s, attainment %.3f, %d requests, %d iterations in %.2f s",
        summary["run"]["label"],
        summary["run"]["engine"],
        summary["run"]["scenario"],
        1e3 * summary["tpot_mean_s"],
        summary["ttft_p99_s"],
        summary["ttft_attainment"],
        summary["requests_finished"],
        summary["iterations"],
        summary.get("sim_wall_s", summary["duration_s"]),
    )
    overloaded = overload(result.requests, summary["run"]["ttft_target_s"])
    if overloaded is not None:
        # A sweep is not to repeat this for every job: there the run's log and summary have it.
        level = logging.INFO if mistakes.in_sweep() else logging.WARNING
        log.log(level, "%s; lower workload.rate_scale (python -m runs.capacity finds the highest rate)", overloaded)
    log.info("written to %s", out)


def job(config: DictConfig) -> float:
    """One Hydra job; returns the summary's `optimized_metric`.

    A single run exits with 2 and one message on what the user can fix, with 130 when interrupted.
    """
    out = Path(HydraConfig.get().runtime.output_dir)
    with mistakes.ending(log, "interrupted: nothing was written", out):
        resume = mistakes.in_sweep() if config.resume is None else config.resume
        summary = finished(config, out) if resume else None
        if summary is None:
            result = evaluate(config, out, dict(HydraConfig.get().runtime.choices))
            _say(result, out)
            summary = result.summary
        else:
            log.info("already in %s", out)
        return optimized(summary, config.optimized_metric, folder.SUMMARY)


main = mistakes.app("evaluate")(job)

if __name__ == "__main__":
    main()
