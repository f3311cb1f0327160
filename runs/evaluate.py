"""Evaluates one controller: `python -m runs.evaluate controller=analytic workload=trace workload.path=FILE ...`.

Composes the configuration (conf/evaluate.yaml), checks it, serves the workload, and writes `config.yaml`,
`summary.json`, `requests.parquet` and, with `record_iterations=true`, `iterations.parquet` into the run folder
(`hydra.run.dir`), beside `evaluate.log`; a real engine also leaves `outputs.jsonl`. Nothing of these is written before
the run has finished.
"""

import json
import logging
from dataclasses import asdict
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from runs import folder, mistakes
from runs.code import code_digest
from runs.evaluation import Evaluation, Result
from runs.progress import progress

log = logging.getLogger("evaluate")


def evaluate(config: DictConfig, out: Path, choices: dict[str, str]) -> Result:
    """Run what `config` says and write the run folder. Raises MistakeError for what the user can fix."""
    evaluation = mistakes.instantiate(config, Evaluation)
    _warn(evaluation)
    with progress() as on_progress, mistakes.named():
        result = evaluation.run(on_progress)
    # A choice may be the path of a file.
    result.summary["run"]["workload"] = Path(choices.get("workload", result.summary["run"]["workload"])).stem
    resolved = OmegaConf.to_yaml(config, resolve=True)
    iterations = result.iterations if evaluation.record_iterations else None
    outputs = None if result.outputs is None else [asdict(output) for output in result.outputs]
    folder.write_run(out, resolved, result.summary, result.requests, iterations, outputs)
    plain = OmegaConf.to_container(config, resolve=True)
    assert isinstance(plain, dict)
    evaluation.logger.record(
        out, {str(key): value for key, value in plain.items()}, result.summary, result.requests, result.iterations
    )
    return result


def _is_there(config: DictConfig, out: Path) -> bool:
    """Whether the folder holds a finished run of this configuration, made with the code as it is."""
    try:
        settings = (out / folder.CONFIG).read_text(encoding="utf-8")
        made = json.loads((out / folder.SUMMARY).read_text(encoding="utf-8"))["run"].get("code")
    except (OSError, ValueError, KeyError, AttributeError):
        return False
    return bool(made == code_digest() and settings == OmegaConf.to_yaml(config, resolve=True))


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
    log.info("written to %s", out)


def job(config: DictConfig) -> None:
    """One Hydra job. Exits with 2 and one message on what the user can fix, with 130 when interrupted."""
    out = Path(HydraConfig.get().runtime.output_dir)
    with mistakes.ending(log, "interrupted: nothing was written", out):
        if config.resume and _is_there(config, out):
            log.info("already in %s", out)
            return
        _say(evaluate(config, out, dict(HydraConfig.get().runtime.choices)), out)


main = mistakes.app("evaluate")(job)

if __name__ == "__main__":
    main()
