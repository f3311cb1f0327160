"""Error for a missing vLLM installation."""


class MissingVllmError(ImportError, ValueError):
    """vLLM is not installed here; the message says how to install it."""


def require_vllm() -> None:
    """Raises MissingVllmError without vLLM."""
    try:
        import vllm  # noqa: F401
    except ImportError as error:
        raise MissingVllmError(
            "engine.backends.vllm needs vLLM 0.32, which is not installed here: pip install 'governor-serving[vllm]', "
            "or the CPU build as docs/vllm.md says"
        ) from error
