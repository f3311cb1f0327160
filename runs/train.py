"""Trains a controller: `python -m runs.train env=vicuna_7b learner=ppo seed=0`.

Composes the configuration (conf/train.yaml) and writes into the run folder (`hydra.run.dir`) `policy.npz`, which
`controller=learned controller.path=...` serves, `metrics.csv`, `config.yaml` and `result.json`, beside `train.log`. The
same command goes on from the folder's last checkpoint after a kill.
"""

import json
import logging
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from engine.files import write_whole
from runs import mistakes
from runs.folder import CONFIG
from runs.learning.training import Training
from runs.metric import optimized
from runs.progress import progress

log = logging.getLogger("train")

RESULT = "result.json"


def kept(result: dict[str, Any]) -> str:
    """Say which of the policies that a run validated is the one in its folder."""
    best, steps = result["best_at_step"], result["steps"]
    if best == 0 < steps:
        return f"the policy of step 0, as it was before training, since none up to step {steps:,} was better"
    return f"the policy of step {best:,} of {steps:,}"


def job(config: DictConfig) -> float:
    """One Hydra job; returns `optimized_metric` of its result.

    A single run exits with 2 and one message on what the user can fix, with 130 when interrupted.
    """
    out = Path(HydraConfig.get().runtime.output_dir)
    with mistakes.ending(log, "interrupted: the same command goes on from the last checkpoint", out):
        training = mistakes.instantiate(config, Training)
        out.mkdir(parents=True, exist_ok=True)
        resolved = OmegaConf.to_yaml(config, resolve=True)
        with mistakes.named(), progress("Training") as on_progress:
            result = training.run(out, on_progress)
        write_whole(out / CONFIG, resolved.encode())
        write_whole(out / RESULT, (json.dumps(result, indent=1) + "\n").encode())
        log.info(
            "%s: objective %.4f, TPOT %.4f times analytic's, TTFT attainment %+.4f, %d steps in %.0f s",
            result["name"],
            result["eval/objective_ratio"],
            result["eval/tpot_ratio"],
            result["eval/attainment_difference"],
            result["steps"],
            result["wall_s"],
        )
        log.info("written to %s: %s", out, kept(result))
        return optimized(result, training.optimized_metric, RESULT)


main = mistakes.app("train")(job)

if __name__ == "__main__":
    main()
