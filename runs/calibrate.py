"""Checks the simulator against reality: `python -m runs.calibrate engine=torch_tiny engine.profile=PATH/engine.yaml`.

Serves prompts for real at several load levels under several controllers, predicts the same runs from the profile that
`runs.profile` wrote, and writes `calibration.json`, the figures and the page `calibration.html` into the folder
(`hydra.run.dir`), with every real run under `runs/`. Started again with the same folder it goes on where it stopped.

With `vllm=DIR` the real runs are recorded ones of vLLM in DIR (see `runs.vllm_runs`), nothing is served, and the
shipped tables of the same cards are checked.
"""

import logging
from pathlib import Path

import pandas as pd
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from runs import mistakes, vllm_runs
from runs.calibration import Calibration
from runs.progress import progress
from runs.reporting import calibration_page
from runs.reporting.calibration_page import Card

log = logging.getLogger("calibrate")


def calibrate(config: DictConfig, out: Path) -> Card:
    """Do what `config` says and write the card. Raises MistakeError for what the user can fix."""
    config = config.copy()
    OmegaConf.set_struct(config, False)
    vllm = config.pop("vllm", None)
    if vllm is not None:
        with mistakes.named():
            card = recorded(Path(vllm))
    else:
        calibration = mistakes.instantiate(config, Calibration)
        with progress() as on_progress, mistakes.named():
            card = calibration.run(out, on_progress)
    calibration_page.write(card, out)
    return card


def recorded(folder: Path) -> Card:
    """The card of recorded vLLM runs."""
    pairs = [vllm_runs.pairs(run) for run in vllm_runs.read_runs(folder)]
    return Card(facts={"real runs": "vLLM 0.19, recorded"}, vllm=pd.concat(pairs, ignore_index=True))


def job(config: DictConfig) -> None:
    """The Hydra job. Exits with 2 and one message on what the user can fix, with 130 when interrupted."""
    out = Path(HydraConfig.get().runtime.output_dir)
    with mistakes.ending(log, f"interrupted: go on with hydra.run.dir={out}", out):
        card = calibrate(config, out)
    for line in card.said:
        log.info("%s", line)
    for note in card.notes:
        log.warning("%s", note)
    log.info("Card: %s", out / calibration_page.PAGE)


main = mistakes.app("calibrate")(job)

if __name__ == "__main__":
    main()
