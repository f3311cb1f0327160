"""Serves a model over HTTP as OpenAI's interface does: `python -m runs.serve engine=torch_tiny controller=analytic`.

Composes the configuration (conf/serve.yaml), loads the models, serves until SIGTERM or Ctrl-C, finishes what was
accepted, and writes `config.yaml`, `summary.json` and `requests.parquet` into the run folder (`hydra.run.dir`), beside
`serve.log`. docs/serving.md says what is served.
"""

import gc
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from runs import folder, mistakes
from runs.endings import MistakeError
from runs.server.service import Outcome, Service

log = logging.getLogger("serve")

SWITCH_INTERVAL_S = 0.0005


def serve(config: DictConfig, out: Path) -> Outcome:
    """Serve as `config` says and write the run folder. Raises MistakeError for what the user can fix."""
    service = mistakes.instantiate(config, Service)
    with mistakes.named():
        listening = service.listen()
        with listening:
            server = service.open(out)
            host, port = listening.getsockname()[:2]
            log.info("%s at http://%s:%d/v1, governed by %s", service.model, host, port, service.controller.label())
            with _settled():
                outcome = server.run(listening)
    if service.api_key is not None:
        config = OmegaConf.merge(config, {"api_key": str(service.api_key)})  # type: ignore[assignment]
    _write(out, config, outcome)
    return outcome


@contextmanager
def _settled() -> Iterator[None]:
    """A process in which the engine's thread does not wait long for the others.

    Each of its calls into compiled code gives up Python's lock, and may wait for a switch interval to get it back. The
    garbage collector need not walk through the models and libraries that are there to stay.
    """
    sys.setswitchinterval(SWITCH_INTERVAL_S)
    # A log that cannot be written, as on a full disk, is no reason for a traceback a line.
    logging.raiseExceptions = False
    gc.collect()
    gc.freeze()
    try:
        yield
    finally:
        gc.unfreeze()


def _write(out: Path, config: DictConfig, outcome: Outcome) -> None:
    """Write the run folder. Where that fails, the summary is printed: nobody can serve those requests again."""
    try:
        folder.write_run(out, OmegaConf.to_yaml(config, resolve=True), outcome.summary, outcome.requests, None)
    except OSError as error:
        print(folder.summary_text(outcome.summary), flush=True)
        raise MistakeError(
            f"{out} cannot be written ({error.strerror or error}); {folder.SUMMARY} is printed"
        ) from error


def _say(outcome: Outcome, out: Path) -> None:
    summary, server = outcome.summary, outcome.summary["server"]
    log.info(
        "%d requests finished, %d cancelled, refused %s: TTFT %.1f ms, TPOT %.2f ms in the mean, %d iterations",
        server["finished"],
        server["cancelled"],
        server["refused"] or "none",
        1e3 * summary["ttft_mean_s"],
        1e3 * summary["tpot_mean_s"],
        summary["iterations"],
    )
    log.info("written to %s", out)


def job(config: DictConfig) -> None:
    """One Hydra job. Exits with 2 and one message on what the user can fix, with 1 if accepted requests were lost."""
    out = Path(HydraConfig.get().runtime.output_dir)
    with mistakes.ending(log, "interrupted before it served", out):
        outcome = serve(config, out)
        _say(outcome, out)
        if not outcome.clean:
            sys.exit(1)


main = mistakes.app("serve")(job)

if __name__ == "__main__":
    main()
