"""vLLM's schedulers with a controller that sets c and n before every step."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import vllm
from vllm.logger import init_logger
from vllm.v1.core.sched.async_scheduler import AsyncScheduler
from vllm.v1.core.sched.output import SchedulerOutput
from vllm.v1.core.sched.scheduler import Scheduler
from vllm.v1.request import Request

from engine.backends.guard import Guard
from engine.backends.vllm.config import USUAL_TTFT_TARGET_S, GovernorConfig, GovernorError
from engine.backends.vllm.observer import Observer
from engine.core.telemetry import as_dict

TRIED = "0.32."
# vLLM shows the lines of its own loggers only.
log = init_logger(f"vllm.{__name__}")


class Governor:
    """The controller of one vLLM scheduler, with its observer, guard and choices.

    Args:
        scheduler: a constructed one; its configured maxima bound the controller's choices.
    """

    def __init__(self, scheduler: Any) -> None:
        if not vllm.__version__.startswith(TRIED):
            log.warning("vLLM is %s here; its scheduler was governed at %sx only", vllm.__version__, TRIED)
        config = GovernorConfig.read(scheduler.vllm_config.additional_config)
        controller = config.load_controller()
        if getattr(controller, "peeks", False) or not callable(getattr(controller, "choose", None)):
            raise GovernorError(
                f"governor.controller={config.controller}: {type(controller).__name__} needs the future workload, "
                "which is unknown here; name a controller"
            )
        own_target = getattr(controller, "ttft_target", None)
        self.config = config
        self.most_candidates: int = scheduler.num_spec_tokens
        self.steers_candidates = scheduler.parallel_config.data_parallel_size == 1
        self.observer = Observer(
            scheduler,
            ttft_target=config.ttft_target or own_target or USUAL_TTFT_TARGET_S,
            queue_rows=config.queue_rows,
        )
        plant = config.plant(
            self.most_candidates,
            scheduler.max_num_scheduled_tokens,
            scheduler.max_num_running_reqs,
            scheduler.kv_cache_config.num_blocks * scheduler.block_size,
        )
        controller.reset(plant)
        self._rehearse(controller)
        controller.reset(plant)
        self.guard = Guard(
            controller.choose, time_limit_s=config.time_limit_s, most_failures=config.most_failures, log=log
        )
        log.info("governed by %s with c <= %d", controller.label(), self.most_candidates)
        if getattr(controller, "speculation", None) is not None:
            log.warning("vLLM drafts equally many candidates for all requests: this controller's sharing has no effect")
        if not self.steers_candidates:
            log.warning("data-parallel engines must draft equally many candidates: c stays as vLLM sets it")

    def _rehearse(self, controller: Any) -> None:
        """Make one decision on an idle engine, so that no request waits for compilation."""
        controller.choose(as_dict(self.observer.observe(0)))

    def decide(self, drafted: int) -> tuple[int, int] | None:
        """(c of the next drafts, total tokens of this step), or None where vLLM's own setting applies.

        `drafted` is the c that the latest drafts were requested with.
        """
        view = as_dict(self.observer.observe(drafted))
        decision = self.guard.ask(view, self.observer.num_decodes)
        if decision is None:
            return None
        candidates, token_budget = decision
        return min(candidates, self.most_candidates), self.observer.decode_tokens + token_budget


class _Governed(Scheduler):
    """Mixin with the additions to both of vLLM's schedulers."""

    max_num_scheduled_tokens: int
    dynamic_sd_lookup: list[int] | None

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        super().__init__(*args, **kwargs)
        ahead = bool(self.scheduler_config.async_scheduling)
        if ahead != isinstance(self, AsyncScheduler):
            wanted = GovernedAsyncScheduler if ahead else GovernedScheduler
            raise GovernorError(
                f"--scheduler-cls engine.backends.vllm.{type(self).__name__} with async_scheduling={ahead}: "
                f"give --scheduler-cls engine.backends.vllm.{wanted.__name__}"
            )
        self.governor = self._new_governor()
        self._decision: tuple[int, int] | None = None
        # The c that the latest drafts were requested with.
        self._drafted = 0
        if self.dynamic_sd_lookup is None and self.num_spec_tokens > 0:
            # Where vLLM knows that draft lengths vary, it does not pad them to the largest.
            self.dynamic_sd_lookup = [self.num_spec_tokens] * (self.max_num_running_reqs + 1)

    def _new_governor(self) -> Any:
        """Build the governor, together with the scheduler."""
        return Governor(self)

    def schedule(self, *args: Any, **kwargs: Any) -> SchedulerOutput:
        """vLLM's own, with this step's total tokens set by the controller, at most vLLM's."""
        most = self.max_num_scheduled_tokens
        self._decision = self.governor.decide(self._drafted) if any(self.get_request_counts()) else None
        if self._decision is not None:
            self.max_num_scheduled_tokens = min(most, self._decision[1])
        try:
            return super().schedule(*args, **kwargs)
        finally:
            self.max_num_scheduled_tokens = most

    def _update_after_schedule(self, scheduler_output: SchedulerOutput) -> None:
        if self._decision is not None and self.governor.steers_candidates:
            scheduler_output.num_spec_tokens_to_schedule = self._decision[0]
        self.governor.observer.planned(scheduler_output, self._drafted)
        if scheduler_output.total_num_scheduled_tokens > 0:
            self._drafted = scheduler_output.num_spec_tokens_to_schedule
        super()._update_after_schedule(scheduler_output)

    def update_from_output(self, scheduler_output: SchedulerOutput, model_runner_output: Any) -> Any:
        """vLLM's own; counts emitted tokens."""
        requests = (self.requests.get(request_id) for request_id in scheduler_output.num_scheduled_tokens)
        before = [(request, request.num_output_tokens) for request in requests if request is not None]
        outputs = super().update_from_output(scheduler_output, model_runner_output)
        self.governor.observer.done(scheduler_output, before)
        return outputs

    def add_request(self, request: Request) -> None:
        """vLLM's own; counts the new request."""
        new = request.request_id not in self.requests
        super().add_request(request)
        if new:
            self.governor.observer.arrived(request)

    def finish_requests(self, request_ids: str | Iterable[str] | None, finished_status: Any) -> list[Request]:
        """vLLM's own; forgets requests that leave early."""
        left = super().finish_requests(request_ids, finished_status)
        for request in left:
            self.governor.observer.gone(request.request_id)
        return left

    def _preempt_request(self, request: Request, *args: Any, **kwargs: Any) -> None:
        super()._preempt_request(request, *args, **kwargs)
        self.governor.observer.preempted(request)

    def shutdown(self) -> None:
        """vLLM's own, after ending the controller's thread."""
        tally = self.governor.guard.tally
        log.info("governed %d steps; %d kept vLLM's own setting: %s", tally.asked, tally.failed, tally)
        self.governor.guard.close()
        super().shutdown()


class GovernedScheduler(_Governed):
    """For `--scheduler-cls engine.backends.vllm.GovernedScheduler --no-async-scheduling`, and wherever vLLM reports
    that it does not schedule asynchronously."""


class GovernedAsyncScheduler(_Governed, AsyncScheduler):
    """For `--scheduler-cls engine.backends.vllm.GovernedAsyncScheduler`, where vLLM schedules one step ahead."""
