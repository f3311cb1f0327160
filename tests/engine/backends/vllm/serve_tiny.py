"""Serve the embedded target with vLLM itself, in a process of its own, and say what its own statistics counted.

    python -m tests.engine.backends.vllm.serve_tiny '{"speculation": {...}, "governor": {...}, "prompts": [[1, 2]]}'

The last line printed is a JSON object. Numba must not be loaded before vLLM's worker is (llvmlite breaks its start on a
CPU without Triton), so nothing of the engine is imported here.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

WEIGHTS = Path(__file__).resolve().parents[4] / "engine" / "models" / "weights"
SETTINGS: dict[str, Any] = {
    "dtype": "float32",
    "enforce_eager": True,
    "block_size": 32,
    "max_num_seqs": 8,
    "max_num_batched_tokens": 512,
    "max_model_len": 1024,
}


def main(job: dict[str, Any]) -> dict[str, Any]:
    """Greedy tokens of every prompt, and (prompt tokens, decoding requests, their tokens) of every step."""
    os.environ |= {"VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_CPU_OMP_THREADS_BIND": "nobind"}
    os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "1")
    from vllm.engine.arg_utils import EngineArgs
    from vllm.sampling_params import SamplingParams
    from vllm.v1.engine.llm_engine import LLMEngine
    from vllm.v1.metrics.loggers import StatLoggerBase

    steps: list[tuple[int, int, int]] = []

    class Keeper(StatLoggerBase):
        """Keeps what vLLM reports of each step."""

        def __init__(self, *_: Any, **__: Any) -> None:
            """Nothing to set up."""

        def record(self, scheduler_stats: Any, *_: Any, **__: Any) -> None:
            """One step."""
            details = getattr(scheduler_stats, "iteration_details", None)
            if details is not None:
                steps.append((details.num_ctx_tokens, details.num_generation_requests, details.num_generation_tokens))

        def log_engine_initialized(self) -> None:
            """Nothing to say."""

    governed: dict[str, Any] = {}
    if job.get("governor"):
        governed = {
            "scheduler_cls": "engine.backends.vllm.GovernedScheduler",
            "async_scheduling": False,
            "additional_config": {"governor": job["governor"]},
        }
    speculation = job.get("speculation")
    if speculation and speculation["method"] == "draft_model":
        speculation = speculation | {"model": str(WEIGHTS / "drafter")}
    arguments = EngineArgs(
        model=str(WEIGHTS / "target"),
        speculative_config=speculation,
        enable_logging_iteration_details=True,
        disable_log_stats=False,
        **SETTINGS,
        **governed,
    )
    engine = LLMEngine.from_engine_args(arguments, stat_loggers=[Keeper])
    sampling = SamplingParams(temperature=0.0, max_tokens=job["max_tokens"], ignore_eos=True)
    for number, prompt in enumerate(job["prompts"]):
        engine.add_request(str(number), {"prompt_token_ids": prompt}, sampling)
    tokens: dict[str, list[int]] = {}
    while engine.has_unfinished_requests():
        for output in engine.step():
            if output.finished:
                assert output.request_id not in tokens, "answered twice"
                tokens[output.request_id] = list(output.outputs[0].token_ids)
    report: dict[str, Any] = {"tokens": [tokens[str(i)] for i in range(len(job["prompts"]))], "steps": steps}
    if governed:
        tally = engine.engine_core.engine_core.scheduler.governor.guard.tally
        report |= {"asked": tally.asked, "failed": tally.failed}
    return report


if __name__ == "__main__":
    print(json.dumps(main(json.loads(sys.argv[1]))))
