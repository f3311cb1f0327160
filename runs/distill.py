"""Distills a controller: `python -m runs.distill env=vicuna_7b controller=learned controller.path=POLICY`.

Composes the configuration (conf/distill.yaml) and writes into the run folder (`hydra.run.dir`) `table.npz`, a lookup
table over (B, KV tokens, queue) that `controller=tabulated controller.path=...` serves, and `result.json`: the loss.
"""

import json
import logging
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig

from engine.files import write_whole
from runs import mistakes
from runs.learning.distillation import Distillation
from runs.progress import progress
from runs.train import RESULT

log = logging.getLogger("distill")


def job(config: DictConfig) -> None:
    """One Hydra job. Exits with 2 and one message on what the user can fix, with 130 when interrupted."""
    out = Path(HydraConfig.get().runtime.output_dir)
    with mistakes.ending(log, "interrupted: nothing was written", out):
        distillation = mistakes.instantiate(config, Distillation)
        with mistakes.named(), progress("Distilling") as on_progress:
            result = distillation.run(out, on_progress)
        write_whole(out / RESULT, (json.dumps(result, indent=1) + "\n").encode())
        log.info(
            "%s from %d decisions: objective %.4f, TPOT %.4f times the controller's, TTFT attainment %+.4f",
            result["name"],
            result["decisions"],
            result["table_to_controller/objective_ratio"],
            result["table_to_controller/tpot_ratio"],
            result["table_to_controller/attainment_difference"],
        )
        log.info("written to %s", out)


main = mistakes.app("distill")(job)

if __name__ == "__main__":
    main()
