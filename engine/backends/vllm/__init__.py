"""vLLM under a governor: schedulers for its `--scheduler-cls` that ask a controller for c and n before every step.

`docs/vllm.md` says how to start it and which versions were tried. vLLM does not promise this interface.
"""

try:
    import vllm  # noqa: F401
except ImportError as error:
    raise ImportError(
        "engine.backends.vllm needs vLLM 0.32, which is not installed here: pip install 'governor-serving[vllm]', or "
        "the CPU build as docs/vllm.md says"
    ) from error

from engine.backends.vllm.scheduler import GovernedAsyncScheduler, GovernedScheduler

__all__ = ["GovernedAsyncScheduler", "GovernedScheduler"]
