"""vLLM under a governor: schedulers for its `--scheduler-cls` that ask a controller for c and n before every step, and
vLLM in this process as an engine that is stepped from outside.

`docs/vllm.md` describes how to start it and lists the tested versions. vLLM does not guarantee this interface. vLLM is
imported only on first use: `engine_config` works without it.
"""

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from engine.backends.vllm.scheduler import GovernedAsyncScheduler, GovernedScheduler

__all__ = ["GovernedAsyncScheduler", "GovernedScheduler"]


def __getattr__(name: str) -> Any:
    if name not in __all__:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    from engine.backends.vllm.missing import require_vllm

    require_vllm()
    from engine.backends.vllm import scheduler

    return getattr(scheduler, name)
