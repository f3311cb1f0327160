"""`governor/Serving-v0`: one serving engine whose actions are candidate counts and token budgets."""

from dataclasses import replace
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces
from gymnasium.envs.registration import EnvSpec
from numpy.typing import NDArray

from engine.backends.real_config import RealEngineConfig
from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.core.objective import Prices
from engine.core.telemetry import as_dict
from engine.workload.source import WorkloadSource
from envs.batch import ServingBatch
from envs.episodes import RENDER_MODES, Episodes, Given, check_render_mode, given_workload
from envs.real import RealEpisodes, runs_for_real
from envs.reward import TERMS
from envs.spaces import action_space, observation_space
from envs.viewer import FPS, Viewer


class ServingEnv(gymnasium.Env[dict[str, NDArray[np.float32]], NDArray[np.int64]]):
    """An LLM serving engine under a governor.

    ## Description

    A continuous-batching engine with speculative decoding and chunked prefill serves a fixed list of requests under a
    virtual clock. Before every iteration the governor chooses c, the candidate tokens each decoding request
    speculates, and n, the prompt tokens prefilled over all requests. A large c lowers the time per output token (TPOT)
    while the GPU is idle and raises it under load; a large n lowers the time to first token (TTFT) and raises TPOT.

    ## Action space

    `MultiDiscrete([len(candidate_choices), len(budget_choices)])`: indices into the choices of `grid`.

    | Num | Action | Unit | Default choices |
    |-----|--------|------|-----------------|
    | 0 | c, candidate tokens per decoding request | tokens | 0 1 2 3 4 5 6 7 8 |
    | 1 | n, prompt tokens per iteration | tokens | 32 64 96 128 192 256 384 512 768 1024 1536 2048 4096 |

    `envs.wrappers` has a `Discrete` and a `Box` form.

    ## Observation space

    A `Dict` of float32 arrays in engineering units, without output lengths, future arrivals or future agreements of
    drafter and target. "Last" is the previous iteration, "new" is since the previous observation. All values except
    slack are >= 0.

    | Key | Index | Observation | Unit | Max |
    |-----|-------|-------------|------|-----|
    | load | 0 | num_decodes: B, requests that decode | requests | 1e6 |
    | | 1 | decode_kv_tokens: their cached tokens | tokens | 1e9 |
    | | 2 | num_waiting: requests whose prompt is not done | requests | 1e6 |
    | | 3 | waiting_tokens: their prompt tokens left | tokens | 1e9 |
    | | 4 | prefilling_tokens: of these, of the prompt in progress | tokens | 1e9 |
    | | 5 | free_kv_tokens: KV cache that new requests may take | tokens | 1e9 |
    | | 6 | free_seqs: requests that may still join the batch | requests | 1e6 |
    | | 7 | interval_s: time since the previous observation | s | 1e6 |
    | | 8 | iterations: new | iterations | 1e6 |
    | | 9 | arrivals: new | requests | 1e6 |
    | | 10 | arrived_tokens: their prompts | tokens | 1e9 |
    | | 11 | finished: new | requests | 1e6 |
    | | 12 | finished_tokens: their outputs | tokens | 1e9 |
    | | 13 | emitted_tokens: new | tokens | 1e9 |
    | | 14 | preemptions: new | requests | 1e6 |
    | | 15 | last_iteration_s | s | 1e6 |
    | | 16 | last_candidates: c chosen | tokens | 1e6 |
    | | 17 | last_prefill_tokens | tokens | 1e9 |
    | | 18 | last_num_decodes | requests | 1e6 |
    | | 19 | last_decode_kv_tokens | tokens | 1e9 |
    | | 20 | last_emitted_tokens | tokens | 1e9 |
    | | 21 | overdue: requests past their deadline without a first token | requests | 1e6 |
    | | 22 | ttft_target_s: l | s | 1e6 |
    | queue | [i, 0] | prompt tokens left of the i-th waiting request, in order of service; 0 = none | tokens | 1e9 |
    | | [i, 1] | its slack to the TTFT deadline, from -1e6; 1e6 if its first token is out already | s | 1e6 |
    | | [M, :] | the waiting requests after the first M: sum of tokens, smallest slack | | |
    | drafted | d | new candidates at depth d + 1 verified after all before them were accepted | tokens | 1e6 |
    | accepted | d | of these, accepted | tokens | 1e6 |
    | rates | b | decoding requests whose own acceptance rate so far is from b / 8 to (b + 1) / 8 | requests | 1e6 |

    ## Reward

    Minus the cost of the decision: TPOT / tpot_target, plus `violation` per missed TTFT deadline, plus `lateness` per
    further `ttft_target` of delay (`engine.core.objective`). The rewards of an episode sum to minus the number of
    requests times the reported objective. `info["reward_terms"]` holds the terms.

    ## Episode end

    Episodes never terminate, because serving is a continuing task. They are truncated when every request of the
    workload has finished, or after `episode_s` or `episode_decisions`; unfinished requests are then charged.
    `info["episode_summary"]` reports the episode. Returns of episodes truncated by decisions do not rank policies: a
    decision for a large n takes longer and meets more requests. Gymnasium's own `max_episode_steps` truncates in the
    same way without a charge.

    ## Arguments

    | Argument | Default | Meaning |
    |----------|---------|---------|
    | `render_mode` | None | `rgb_array`: `render()` gives a picture of the last 120 decisions (`envs.viewer`) |
    | `engine` | `vicuna_7b_a100` | name of a shipped latency table or an `EngineConfig`; or a real engine: `vllm`, a \
`VllmEngineConfig` or a `TorchEngineConfig` |
    | `workload` | None | a name of `conf/workload`, as the apps' `workload=NAME`; a `WorkloadSource`, which draws a \
workload per episode; one `Workload` for all of them (a real engine also takes `Prompts`); None: 200 requests of \
ShareGPT lengths at 2 a second |
    | `ttft_target` | 1.0 | l, s |
    | `tpot_target` | None | TPOT that costs 1 a request, s; None: that of `prices` |
    | `prices` | None | `engine.core.objective.Prices`; None: TPOT target 0.05 s, violation 2, lateness 1 |
    | `grid` | None | `engine.core.action.ActionGrid`, the choices; None: those of the action space above |
    | `queue_rows` | 64 | M, waiting requests observed one by one |
    | `decide_every` | 1 | iterations per decision |
    | `decision_s` | 20e-6 | time charged per decision on the engine's clock, s |
    | `episode_s` | None | time on the engine's clock after which an episode is cut, s; None serves every request |
    | `episode_decisions` | None | decisions after which an episode is cut |
    | `distinct_workloads` | 64 | draw the workload's seed from this many and keep what was drawn, because drawing \
one costs about as much as serving it; None draws a new workload for every episode |

    `reset(options={"workload": workload})` runs a given workload, for comparisons on common random numbers.

    ## Learners

    Observations and rewards are in engineering units, which should be scaled for networks:
    `envs.wrappers.FlatObservation` scales observations. With Stable-Baselines3,
    `VecNormalize(make_vec_env("governor/Serving-v0"))` scales both for `PPO("MultiInputPolicy", ...)`. The wrappers in
    `gymnasium.wrappers.vector` that normalise need the vector environment with `autoreset_mode="NEXT_STEP"`.

    ## Real engines

    Spaces, info and reward are the same; times are the measured times of the iterations. The engine's clock pauses
    between two steps, so a learner's own time does not count (`decision_s` is still charged), and it skips idle time.
    Such an episode is not reproducible to the bit, and `spec.nondeterministic` is true. vLLM verifies the c of an
    action one iteration later (`docs/vllm.md`). `close()` shuts the engine down.
    """

    metadata = {"render_modes": RENDER_MODES, "render_fps": FPS}  # noqa: RUF012
    _spec: EnvSpec | None = None

    def __init__(
        self,
        render_mode: str | None = None,
        *,
        engine: str | EngineConfig | RealEngineConfig = "vicuna_7b_a100",
        workload: str | WorkloadSource | Given | None = None,
        ttft_target: float = 1.0,
        tpot_target: float | None = None,
        prices: Prices | None = None,
        grid: ActionGrid | None = None,
        queue_rows: int = 64,
        decide_every: int = 1,
        decision_s: float = 20e-6,
        episode_s: float | None = None,
        episode_decisions: int | None = None,
        distinct_workloads: int | None = 64,
    ) -> None:
        check_render_mode(render_mode)
        self.render_mode = render_mode
        settings: dict[str, Any] = {
            "engine": engine,
            "workload": workload,
            "ttft_target": ttft_target,
            "tpot_target": tpot_target,
            "prices": prices,
            "grid": grid,
            "queue_rows": queue_rows,
            "decide_every": decide_every,
            "decision_s": decision_s,
            "episode_s": episode_s,
            "episode_decisions": episode_decisions,
            "distinct_workloads": distinct_workloads,
        }
        self.batch: Episodes = RealEpisodes(**settings) if runs_for_real(engine) else ServingBatch(1, **settings)
        self.observation_space: spaces.Space[Any] = observation_space(self.batch.queue_rows, self.batch.max_candidates)
        self.action_space: spaces.Space[Any] = action_space(self.batch.grid)
        self._viewer = Viewer(self.batch.grid) if render_mode is not None else None

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, NDArray[np.float32]], dict[str, Any]]:
        """Begin an episode; the seed draws its workload unless `options["workload"]` gives one."""
        super().reset(seed=seed)
        given = given_workload(options)
        self.batch.reset([0], [self.np_random], None if given is None else [given])
        observation = self.batch.new_observation()
        self.batch.observe([0], observation)
        if self._viewer is not None:
            self._viewer.clear()
        return as_dict(observation), {}

    def step(
        self, action: NDArray[np.int64]
    ) -> tuple[dict[str, NDArray[np.float32]], float, bool, bool, dict[str, Any]]:
        """Run `decide_every` iterations under `action`; ActionError when it is off the grid."""
        actions = np.asarray(action)[None]
        observation, costs, over = self.batch.step(actions)
        if self._viewer is not None:
            self._viewer.add(actions[0], observation, 0)
        info: dict[str, Any] = {"reward_terms": dict(zip(TERMS, costs[0].tolist(), strict=True))}
        if over[0]:
            info["episode_summary"] = self.batch.summary(0)
        return as_dict(observation), float(-costs[0].sum()), False, bool(over[0]), info

    def render(self) -> NDArray[np.uint8] | None:
        """(192, 320, 3) the picture of the last decisions; None without a `render_mode`."""
        return None if self._viewer is None else self._viewer.frame()

    def close(self) -> None:
        """Release the engine."""
        self.batch.close()

    @property
    def spec(self) -> EnvSpec | None:
        """The environment's spec."""
        return self._spec

    @spec.setter
    def spec(self, spec: EnvSpec | None) -> None:
        if spec is not None and isinstance(self.batch, RealEpisodes):
            spec = replace(spec, nondeterministic=True)
        self._spec = spec
