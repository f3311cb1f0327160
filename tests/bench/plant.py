"""The engine and the traffic that the benchmarks share."""

from __future__ import annotations

from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.latency.lookup import LookupTable
from engine.plant import Plant
from engine.simulator.simulator import Simulator
from engine.workload.arrivals import PoissonArrivals
from engine.workload.lengths import NamedLengths
from engine.workload.source import SyntheticSource

REQUESTS = 100_000
RATE = 12.0


def simulator(rate: float = RATE, requests: int = REQUESTS) -> Simulator:
    """Vicuna-7B on an A100 with Poisson arrivals and LMSYS-Chat-1M lengths."""
    source = SyntheticSource(
        name="poisson_lmsys",
        arrivals=PoissonArrivals(rate=rate),
        lengths=NamedLengths(name="lmsys_chat_1m"),
        num_requests=requests,
    )
    config = EngineConfig(name="vicuna_7b_a100", latency="vicuna_7b_a100")
    return Simulator(config, [source.draw(seed=0)], ttft_target=1.0)


def plant(engine: Simulator) -> Plant:
    """The default action grid and the lookup table fitted to this engine (from the disk cache after the first time)."""
    grid, limits = ActionGrid(), engine.limits
    capacity = limits.total_blocks * limits.block_size

    def predict() -> LookupTable:
        choices = (grid.candidate_choices, grid.budget_choices)
        return LookupTable.load_or_fit(engine.latency, *choices, limits.max_num_seqs, capacity)

    return Plant(grid=grid, predict=predict)
