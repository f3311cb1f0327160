"""vLLM's scheduler with an executor that computes nothing: a workload says what is accepted, a latency model how long
a step takes, and the clock is virtual."""

from __future__ import annotations

import tempfile
from collections import deque
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
import yaml
from vllm.engine.arg_utils import EngineArgs
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.kv_cache_interface import FullAttentionSpec, KVCacheConfig, KVCacheGroupSpec
from vllm.v1.outputs import DraftTokenIds, ModelRunnerOutput
from vllm.v1.request import Request
from vllm.v1.structured_output import StructuredOutputManager

from engine.backends.vllm.config import USUAL_TTFT_TARGET_S
from engine.backends.vllm.observer import Observer
from engine.latency.model import LatencyModel, iteration_time, prefill_attention_time
from engine.models.load import DRAFTER_FOLDER, TARGET_FOLDER
from engine.workload.workload import Workload

TOKEN = 7


@dataclass(frozen=True)
class Step:
    """One executed step: what was in it, and when."""

    start_s: float
    end_s: float
    drafted: int
    """c that its drafts were asked for by the scheduler's output of the step before."""
    candidates: int
    """The most candidates verified for one request."""
    num_decodes: int
    decode_tokens: int
    num_prefills: int
    prefill_tokens: int
    scheduled_tokens: int
    beyond_output: int
    """Candidates verified past the output limit of their request."""


@dataclass
class Setup:
    """How vLLM is configured."""

    most_candidates: int = 4
    most_tokens: int = 512
    max_num_seqs: int = 8
    num_blocks: int = 4096
    block_size: int = 16
    watermark: float = 0.0
    max_model_len: int = 4096
    governor: dict[str, Any] = field(default_factory=dict)


def _speculation(most_candidates: int, asynchronous: bool) -> dict[str, Any]:
    """A drafter that vLLM allows: prompt lookup, or under async scheduling a model."""
    if asynchronous:
        return {"method": "draft_model", "model": str(DRAFTER_FOLDER), "num_speculative_tokens": most_candidates}
    return {"method": "ngram", "num_speculative_tokens": most_candidates, "prompt_lookup_max": 3}


def scheduler(cls: type[Scheduler], setup: Setup) -> Any:
    """A scheduler of vLLM's own making, on a model whose weights are never read."""
    asynchronous = issubclass(cls, AsyncScheduler)
    config = EngineArgs(
        model=str(TARGET_FOLDER),
        dtype="float32",
        max_model_len=setup.max_model_len,
        hf_overrides={"max_position_embeddings": setup.max_model_len},
        max_num_seqs=setup.max_num_seqs,
        max_num_batched_tokens=setup.most_tokens,
        block_size=setup.block_size,
        watermark=setup.watermark,
        enable_prefix_caching=False,
        async_scheduling=asynchronous,
        scheduler_cls=cls,
        speculative_config=_speculation(setup.most_candidates, asynchronous) if setup.most_candidates else None,
        additional_config={"governor": setup.governor} if setup.governor else {},
        enforce_eager=True,
        disable_log_stats=False,
    ).create_engine_config()
    # vLLM turns it off on a processor, where its real executor has nothing to overlap.
    config.scheduler_config.async_scheduling = asynchronous
    config.cache_config.num_gpu_blocks = setup.num_blocks
    spec = FullAttentionSpec(block_size=setup.block_size, num_kv_heads=1, head_size=1, dtype=torch.float32)
    cache = KVCacheConfig(setup.num_blocks, [], [KVCacheGroupSpec(["layer"], spec)])
    return cls(config, cache, StructuredOutputManager(config), block_size=setup.block_size, log_stats=True)


def controller_file(folder: Path, target: str, **settings: Any) -> Path:
    """A controller's yaml."""
    handle, name = tempfile.mkstemp(suffix=".yaml", dir=folder)
    with open(handle, "w", encoding="utf-8") as file:
        yaml.safe_dump({"_target_": target, **settings}, file)
    return Path(name)


class FakeEngine:
    """Serves a workload to its end through a vLLM scheduler.

    Args:
        scheduler: vLLM's, made by `scheduler`.
        charge_beyond_output: a step takes the time of all its tokens; False: candidates past a request's output limit
            cost nothing, as if they had not been verified.
    """

    def __init__(
        self, scheduler: Any, workload: Workload, latency: LatencyModel, *, charge_beyond_output: bool = True
    ) -> None:
        self.scheduler, self.workload, self.latency = scheduler, workload, latency
        self.charge_beyond_output = charge_beyond_output
        self.now = 0.0
        self.steps: list[Step] = []
        self.emitted: dict[str, list[tuple[float, int]]] = {}
        """(time, tokens) of every request's outputs."""
        self.finished: dict[str, int] = {}
        """How often a request was answered to its end."""
        self.stats: list[Any] = []
        """vLLM's SchedulerStats, step by step."""
        self._arrived = 0
        self._drafted = 0
        if hasattr(scheduler, "governor"):
            governor = scheduler.governor
            governor.observer = Observer(
                scheduler,
                ttft_target=governor.config.ttft_target or USUAL_TTFT_TARGET_S,
                queue_rows=governor.config.queue_rows,
                clock=lambda: self.now,
            )

    def _release(self) -> None:
        while self._arrived < self.workload.num_requests and self.workload.arrival[self._arrived] <= self.now:
            number = self._arrived
            self.scheduler.add_request(
                Request(
                    request_id=str(number),
                    prompt_token_ids=[TOKEN] * int(self.workload.prompt_tokens[number]),
                    sampling_params=SamplingParams(
                        max_tokens=int(self.workload.output_tokens[number]), ignore_eos=True, temperature=0.0
                    ),
                    pooling_params=None,
                    arrival_time=float(self.workload.arrival[number]),
                )
            )
            self._arrived += 1

    def run(self, most_steps: int = 100_000) -> None:
        """To the last request; vLLM's own loop, with up to two steps in flight under async scheduling."""
        in_flight: deque[tuple[SchedulerOutput, float, int]] = deque()
        depth = 2 if isinstance(self.scheduler, AsyncScheduler) else 1
        for _ in range(most_steps):
            self._release()
            if self.scheduler.has_requests():
                output = self.scheduler.schedule()
                in_flight.append((output, self.now, self._drafted))
                if output.total_num_scheduled_tokens > 0:
                    self._drafted = output.num_spec_tokens_to_schedule
                if len(in_flight) < depth and output.total_num_scheduled_tokens > 0:
                    continue
            if in_flight:
                self._finish(*in_flight.popleft())
            elif self._arrived < self.workload.num_requests:
                self.now = max(self.now, float(self.workload.arrival[self._arrived]))
            else:
                return
        raise AssertionError(f"requests are left after {most_steps} steps: {self.scheduler.get_request_counts()}")

    def _finish(self, output: SchedulerOutput, started: float, drafted: int) -> None:
        """Compute nothing for as long as it takes, and tell the scheduler."""
        sampled: list[list[int]] = []
        decodes = kv_tokens = decode_tokens = beyond = most = 0
        prefills: list[tuple[int, int]] = []
        completed = 0
        for request_id, tokens in output.num_scheduled_tokens.items():
            request = self.scheduler.requests.get(request_id)
            if request is None:
                sampled.append([])
                continue
            candidates = len(output.scheduled_spec_decode_tokens.get(request_id, ()))
            generated = request.num_output_tokens
            before = request.num_computed_tokens - request.num_in_flight_tokens
            # Tokens of the context that are still to be computed: 1 when it decodes.
            missing = request.num_tokens - before
            if generated > 0 and missing <= 1:
                decodes += 1
                kv_tokens += before
                left = request.max_tokens - generated - 1
                beyond += max(0, candidates - left)
                counted = candidates if self.charge_beyond_output else min(candidates, left)
                decode_tokens += 1 + counted
                most = max(most, counted)
            else:
                prefills.append((tokens, before))
                completed += tokens == missing
            if tokens < missing:
                sampled.append([])
                continue
            position = self.workload.offset[int(request_id)] + generated
            run = int(self.workload.run_length[position]) if generated < request.max_tokens else 0
            sampled.append([TOKEN] * (1 + min(candidates, run)))
        if output.total_num_scheduled_tokens > 0:
            begin = max(started, self.steps[-1].end_s if self.steps else 0.0)
            self.now = max(
                self.now, begin + self._seconds(decodes, decode_tokens, most, kv_tokens, prefills, completed)
            )
            self.steps.append(
                Step(
                    start_s=begin,
                    end_s=self.now,
                    drafted=drafted,
                    candidates=max(map(len, output.scheduled_spec_decode_tokens.values()), default=0),
                    num_decodes=decodes,
                    decode_tokens=decode_tokens + (beyond if not self.charge_beyond_output else 0),
                    num_prefills=len(prefills),
                    prefill_tokens=sum(chunk for chunk, _ in prefills),
                    scheduled_tokens=output.total_num_scheduled_tokens,
                    beyond_output=beyond,
                )
            )
        ids = list(output.num_scheduled_tokens)
        drafts = output.num_spec_tokens_to_schedule
        results = self.scheduler.update_from_output(
            output,
            ModelRunnerOutput(
                req_ids=ids, req_id_to_index={r: i for i, r in enumerate(ids)}, sampled_token_ids=sampled
            ),
        )
        for answers in results.values():
            if answers.scheduler_stats is not None:
                self.stats.append(answers.scheduler_stats)
            for answer in answers.outputs:
                self.emitted.setdefault(answer.request_id, []).append((self.now, len(answer.new_token_ids)))
                if answer.finish_reason is not None:
                    self.finished[answer.request_id] = self.finished.get(answer.request_id, 0) + 1
        if ids and not isinstance(self.scheduler, AsyncScheduler):
            self.scheduler.update_draft_token_ids(DraftTokenIds(ids, [[TOKEN] * drafts for _ in ids]))

    def _seconds(
        self,
        decodes: int,
        decode_tokens: int,
        candidates: int,
        kv_tokens: int,
        prefills: list[tuple[int, int]],
        completed: int,
    ) -> float:
        tables = self.latency.tables
        attention = sum(float(prefill_attention_time(tables, chunk, context)) for chunk, context in prefills)
        return float(
            iteration_time(
                tables,
                decodes,
                decode_tokens,
                candidates,
                kv_tokens,
                len(prefills),
                sum(chunk for chunk, _ in prefills),
                attention,
                decode_tokens + completed,
            )
        )
