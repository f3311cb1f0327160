"""vLLM in this process as an engine that is stepped from outside, like the simulator and the torch engine."""

from __future__ import annotations

import os
import platform
import sys
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from numpy.typing import NDArray
from vllm.engine.arg_utils import EngineArgs
from vllm.platforms import current_platform
from vllm.sampling_params import SamplingParams
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.engine.core import EngineCore
from vllm.v1.executor import Executor
from vllm.v1.request import Request

from engine.backends.clock import Clock
from engine.backends.real import RealEngine
from engine.backends.vllm.engine_config import VllmEngineConfig
from engine.backends.vllm.ledger import Entry, Ledger
from engine.backends.vllm.observer import Observer, decode_tokens, decodes
from engine.backends.vllm.scheduler import _Governed
from engine.core.membership import cancel
from engine.core.state import CANCELLED
from engine.core.telemetry import Observation
from engine.latency.measured_fit import MemoryFigures, weight_bytes
from engine.limits import EngineLimits
from engine.speculation.sampling import GREEDY, Sampling

if TYPE_CHECKING:
    from engine.backends.vllm.rehearsal import VllmRehearsal

_running: list[VllmEngine] = []
"""Open engines of this process."""


class Driver:
    """Substitute for the governor: the decision of a step is set by the engine's owner.

    Args:
        scheduler: vLLM's, stepped only through this engine.
    """

    steers_candidates = True

    def __init__(self, scheduler: Any) -> None:
        self.action = (0, 1)
        """(c, n) of the next step."""
        self.observer: Observer
        """Replaced by every reset of the engine, like `ledger`."""
        self.ledger: Ledger
        self.ran_out: set[str] = set()
        """Requests whose drafter proposed fewer candidates than requested."""
        self._scheduler = scheduler

    def decide(self, drafted: int) -> tuple[int, int]:
        """(c of the next drafts, total tokens of this step)."""
        scheduler = self._scheduler
        decoding = [request for request in scheduler.running if decodes(request)]
        self.ran_out = {request.request_id for request in decoding if len(request.spec_token_ids) < drafted}
        tokens = sum(decode_tokens(request, scheduler.max_model_len) for request in decoding)
        return self.action[0], self.action[1] + tokens


class DrivenScheduler(_Governed):
    """vLLM's scheduler with c and n set from outside; its steps are written into a ledger."""

    governor: Driver

    def _new_governor(self) -> Driver:
        return Driver(self)

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        entries = [
            Entry(int(request_id), tokens, request_id in self.governor.ran_out)
            for request_id, tokens in scheduler_output.num_scheduled_tokens.items()
        ]
        free = self.kv_cache_manager.block_pool.get_num_free_blocks()
        self.governor.ledger.planned(entries, self._drafted, self.governor.action[1], free)
        super()._update_after_schedule(scheduler_output)

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self.governor.ledger.preempted(int(request.request_id))

    @property
    def drafted(self) -> int:
        """The c that the latest drafts were requested with."""
        return self._drafted

    def begin(self) -> None:
        """Record that nothing is drafted for coming requests."""
        self._drafted = 0

    def shutdown(self) -> None:
        """vLLM's own."""
        Scheduler.shutdown(self)


class VllmEngine(RealEngine):
    """Serves token-id prompts with vLLM, one `step` an iteration.

    The c of a step is drafted at its end and verified in the next; its n applies at once. Requests are counted in the
    request table by the same code as on every other engine, and observed as a governed vLLM observes.

    Args:
        config: settings that vLLM is started with.
        ttft_target: latency requirement on TTFT in s, which telemetry and lateness are counted against.
        queue_rows: M, the requests an observation lists one by one.
        clock: real time by default.
    """

    def __init__(
        self, config: VllmEngineConfig, *, ttft_target: float, queue_rows: int = 64, clock: Clock | None = None
    ) -> None:
        self._core = _started(config)
        self._scheduler: Any = self._core.scheduler
        cache = self._scheduler.kv_cache_config
        limits = EngineLimits(
            cache.num_blocks - 1,
            self._scheduler.block_size,
            int(self._scheduler.kv_cache_manager.watermark_blocks),
            config.max_num_seqs,
            config.max_model_len,
        )
        super().__init__(
            limits,
            int(self._core.vllm_config.model_config.get_vocab_size()),
            config.most_candidates,
            ttft_target=ttft_target,
            queue_rows=queue_rows,
            clock=clock,
        )
        self._ttft_target = ttft_target
        self._requests: dict[int, Request] = {}
        self._outputs: dict[int, list[int]] = {}
        self.reset(clock)
        _running.append(self)

    def submit(
        self,
        prompt: Sequence[int] | NDArray[np.integer],
        max_tokens: int,
        sampling: Sampling = GREEDY,
        *,
        stop: Collection[int] = (),
        arrival: float | None = None,
    ) -> int:
        """See `RealEngine.submit`."""
        tokens, arrival, number = self._append(prompt, max_tokens, arrival)
        self._scheduler.governor.ledger.state = self.state
        self._requests[number] = Request(
            request_id=str(number),
            prompt_token_ids=tokens.tolist(),
            sampling_params=SamplingParams(
                temperature=sampling.temperature,
                top_k=sampling.top_k,
                top_p=sampling.top_p,
                seed=None if sampling.greedy else sampling.seed % 2**63,
                max_tokens=max_tokens,
                ignore_eos=True,
                stop_token_ids=sorted(stop),
                detokenize=False,
            ),
            pooling_params=None,
            arrival_time=arrival,
        )
        self._outputs[number] = []
        return number

    def cancel(self, number: int) -> bool:
        """Cancel a request, keeping its output so far; returns False when it was over already."""
        if not cancel(self.state, 0, number):
            return False
        # A request that has not arrived is skipped on arrival.
        self._core.abort_requests([str(number)])
        return True

    def output(self, number: int) -> list[int]:
        """Tokens generated so far."""
        return list(self._outputs[number])

    def observe(self, observation: Observation) -> None:
        """Write telemetry into `observation` (see `engine.core.telemetry`), as a governed vLLM's controller sees it."""
        seen = self._scheduler.governor.observer.observe(self._scheduler.drafted)
        observation.load[:], observation.queue[:], observation.rates[:] = seen.load, seen.queue, seen.rates
        for into, counts in ((observation.drafted, seen.drafted), (observation.accepted, seen.accepted)):
            into[:] = counts[:, : into.shape[1]]

    def step(self, candidates: int, token_budget: int) -> bool:
        """Run one iteration at the given c and n; False, at once, when no request has arrived that is unfinished."""
        start = self.clock.now()
        if not self._release(start):
            return False
        driver = self._scheduler.governor
        driver.action = (min(candidates, self.max_candidates), token_budget)
        answers, ran = self._core.step()
        self._core.post_step(ran)
        self._store(answers, self.clock.now() - start)
        return True

    def _store(self, answers: Any, elapsed: float) -> None:
        """Append emitted tokens to the outputs, and close the step in the ledger."""
        ledger = self._scheduler.governor.ledger
        found = {int(answer.request_id): answer for outputs in answers.values() for answer in outputs.outputs}
        self.emitted, self.finished, counts, ended = [], [], [], []
        for number in ledger.rows:
            answer = found.get(number)
            tokens = [] if answer is None else list(answer.new_token_ids)
            over = answer is not None and answer.finish_reason is not None
            counts.append(len(tokens))
            ended.append(over)
            if tokens:
                self._outputs[number].extend(tokens)
                self.emitted.append((number, tokens))
            if over:
                self.finished.append(number)
        ledger.done(counts, ended, elapsed, self._scheduler.kv_cache_manager.block_pool.get_num_free_blocks())

    def reset(self, clock: Clock | None = None) -> None:
        """See `RealEngine.reset`."""
        scheduler = self._scheduler
        if scheduler.requests:
            self._core.abort_requests(list(scheduler.requests))
        if scheduler.has_finished_requests():
            # Request numbers restart: an empty step tells the workers that earlier requests are over.
            self._core.step()
        super().reset(clock)
        self._requests, self._outputs = {}, {}
        scheduler.begin()
        scheduler.governor.ledger = Ledger(self.state)
        scheduler.governor.observer = Observer(
            scheduler, ttft_target=self._ttft_target, queue_rows=self.queue_rows, clock=self.clock.now
        )

    def _arrived(self, rows: range) -> None:
        for number in rows:
            request = self._requests.pop(number)
            if self.state.requests["phase"][number] != CANCELLED:
                self._core.add_request(request)

    @property
    def most_prompt_tokens(self) -> int:
        """The largest n that a step has room for beside its decodes."""
        settings = self._core.vllm_config
        return int(self._scheduler.max_num_scheduled_tokens) - settings.scheduler_config.max_num_seqs * (
            1 + self.max_candidates
        )

    @property
    def runner(self) -> Any:
        """vLLM's model runner, in this process."""
        executor: Any = self._core.model_executor
        return executor.driver_worker.worker.model_runner

    def rehearsal(self, text: NDArray[np.int32]) -> VllmRehearsal:
        """Driver that repeats single iterations of this engine, for profiling."""
        from engine.backends.vllm.rehearsal import VllmRehearsal

        return VllmRehearsal(self, text)

    def memory(self) -> MemoryFigures:
        """Memory taken by weights and cache."""
        drafter = getattr(getattr(self.runner, "drafter", None), "model", None)
        cached = sum(tensor.size for tensor in self._scheduler.kv_cache_config.kv_cache_tensors)
        return MemoryFigures(
            total_bytes=float(current_platform.get_device_total_memory()),
            weight_bytes=weight_bytes(self.runner.model),
            drafter_weight_bytes=0.0 if drafter is None else weight_bytes(drafter),
            kv_bytes_per_token=cached // ((self.limits.total_blocks + 1) * self.limits.block_size),
        )

    def about(self) -> dict[str, Any]:
        """Device and software that the engine runs on; JSON-serialisable."""
        model = self._core.vllm_config.model_config
        processor = current_platform.is_cpu()
        return {
            "device": current_platform.device_type,
            "device_name": platform.processor() if processor else current_platform.get_device_name(),
            "dtype": str(model.dtype).removeprefix("torch."),
            "torch": torch.__version__,
            "transformers": version("transformers"),
            "vllm": sys.modules["vllm"].__version__,
        }

    def close(self) -> None:
        """Shut vLLM down."""
        if self not in _running:
            return
        _running.remove(self)
        if _running:
            # Engines of one process share vLLM's communicators, and its shutdown closes them for all.
            self._scheduler.shutdown()
        else:
            self._core.shutdown()


def _started(config: VllmEngineConfig) -> EngineCore:
    """vLLM's engine, its scheduler driven from outside. Raises ValueError for what vLLM refuses."""
    on_processor = current_platform.is_cpu()
    if on_processor:
        torch.set_num_threads(config.threads)
    with _environment(VLLM_ENABLE_V1_MULTIPROCESSING="0", VLLM_CPU_OMP_THREADS_BIND="nobind"), _scannable_llvmlite():
        arguments = EngineArgs(**config.arguments(on_processor), scheduler_cls=DrivenScheduler, disable_log_stats=True)
        settings = arguments.create_engine_config()
        return EngineCore(settings, Executor.get_class(settings), log_stats=False)


@contextmanager
def _environment(**variables: str) -> Iterator[None]:
    """Context in which these environment variables are set, for settings that vLLM reads from nowhere else."""
    before = {name: os.environ.get(name) for name in variables}
    os.environ.update(variables)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


@contextmanager
def _scannable_llvmlite() -> Iterator[None]:
    """Context that works around vLLM 0.32's worker inspecting every loaded module.

    On a CPU without Triton it reads `__dict__` of every module attribute. Numba's LLVM handle turns that name into a C
    function, and start-up fails with "'_lib_fn_wrapper' object has no attribute 'get'".
    """
    ffi = sys.modules.get("llvmlite.binding.ffi")
    functions = getattr(getattr(ffi, "lib", None), "_fntab", None)
    if functions is None:
        yield
        return
    before = functions.get("__dict__")
    functions["__dict__"] = {}
    try:
        yield
    finally:
        del functions["__dict__"]
        if before is not None:
            functions["__dict__"] = before
