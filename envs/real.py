"""Episodes on one real engine: the same actions, telemetry and costs as on simulated ones, in real time."""

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from engine.backends.clock import SteppedClock
from engine.backends.real import warm_up
from engine.backends.real_config import RealEngineConfig
from engine.backends.vllm.engine_config import VllmEngineConfig
from engine.core.objective import charges
from engine.core.state import State
from engine.core.telemetry import Observation, allocate_observation
from engine.workload.prompts import Prompts, PromptSource, prompts_for
from engine.workload.source import WorkloadSource
from engine.workload.workload import Workload
from envs.episodes import Episodes, Given
from envs.reward import TERMS, unfinished_cost

VLLM = "vllm"
"""Name of vLLM with its default settings, in place of a config."""


def runs_for_real(engine: Any) -> bool:
    """Return True if an environment's `engine` is a real one."""
    return engine == VLLM or isinstance(engine, RealEngineConfig)


class RealEpisodes(Episodes):
    """One real engine with episodes.

    Args are those of `envs.serving.ServingEnv`. The engine is started here and runs until `close`. Its clock pauses
    between two steps and skips times without work, so an episode takes the seconds of its iterations.
    """

    takes = (Workload, Prompts)

    def __init__(self, *, engine: str | RealEngineConfig, **settings: Any) -> None:
        super().__init__(1, engine=engine, **settings)
        config = VllmEngineConfig(name=VLLM) if isinstance(engine, str) else engine
        self.config = config
        self.engine = config.build(ttft_target=self.ttft_target, queue_rows=self.queue_rows)
        if self.max_candidates > self.engine.max_candidates:
            self.engine.close()
            raise ValueError(
                f"grid.candidate_choices={list(self.grid.candidate_choices)}: the drafter of engine={config.name} "
                f"proposes at most {self.engine.max_candidates}; give a grid without those above, or another drafter"
            )
        self._tokenizer = config.tokenizer()
        self._clock: SteppedClock | None = None

    @property
    def state(self) -> State:
        if self._clock is None:
            raise RuntimeError("call reset() before anything else")
        return self.engine.state

    def arrived(self, e: int) -> NDArray[np.void]:
        return self.engine.arrived

    def new_observation(self) -> Observation:
        return allocate_observation(1, self.queue_rows, self.max_candidates)

    def _make(self, source: WorkloadSource | Given, seed: int) -> Prompts:
        if isinstance(source, Prompts):
            return source
        if isinstance(source, PromptSource):
            return source.draw_prompts(seed, self._tokenizer, self.config.limits)
        drawn = source.draw(seed) if isinstance(source, WorkloadSource) else source
        return prompts_for(drawn, seed, self._tokenizer, self.config.limits)

    def reset(
        self, envs: Sequence[int], rngs: Sequence[np.random.Generator], workloads: Sequence[Given] | None = None
    ) -> None:
        """See `Episodes.reset`: the engine restarts on the prompts of the single environment."""
        prompts: Prompts = self._made(self._origins_of(rngs, workloads)[0])
        engine = self.engine
        if self._clock is None:
            warm_up(engine, prompts)
        self._clock = SteppedClock()
        engine.reset(self._clock)
        for i, tokens in enumerate(prompts.tokens):
            limit, arrival = int(prompts.max_tokens[i]), float(prompts.arrival[i])
            engine.submit(tokens, limit, prompts.sampling[i], stop=prompts.stop, arrival=arrival)
        self._settle(self._clock)
        self.decisions[:] = 0

    def _settle(self, clock: SteppedClock) -> bool:
        """Jump to the next arrival if idle; returns False when no request is left."""
        while not self.engine.poll():
            arrival = self.engine.next_arrival
            if arrival is None:
                return False
            clock.wait_until(arrival)
        return True

    def observe(self, envs: Sequence[int], observation: Observation) -> None:
        self.engine.observe(observation)

    def _totals(self) -> NDArray[np.float64]:
        return charges(self.engine.state, 0)

    def step(self, actions: NDArray[np.int64]) -> tuple[Observation, NDArray[np.float64], NDArray[np.bool_]]:
        """See `Episodes.step`: iterations run on the real engine."""
        clock = self._clock
        if clock is None:
            raise RuntimeError("call reset() before anything else")
        self._check_actions(actions)
        candidates, token_budget = self.grid.values(actions[0])
        before = self._totals()
        more = True
        clock.go()
        clock.advance(self.decision_s)
        for _ in range(self.decide_every):
            self.engine.step(candidates, token_budget)
            more = self._settle(clock)
            if not more:
                break
        clock.stop()
        costs = np.zeros((1, len(TERMS)))
        costs[0, :3] = (self._totals() - before) * self._unit_prices
        self.decisions += 1
        cut = self.state.instances["now"][0] >= self.episode_s or self.decisions[0] >= self.episode_decisions
        if more and cut:
            costs[0, 3] = unfinished_cost(self.state, 0, self.arrived(0), self.prices)
        observation = self.new_observation()
        self.observe([0], observation)
        return observation, costs, np.array([not more or cut])

    def close(self) -> None:
        """Shut the engine down."""
        self.engine.close()
