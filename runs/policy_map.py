"""Draws what controllers choose: `python -m runs.policy_map policy.npz ... --engine vicuna_7b_a100 --out map.png`.

c and n over the batch and the queue, `analytic` first, then the policies or tables given, each a path or the name of a
shipped one.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from controllers.analytic import Analytic
from controllers.controller import Controller
from controllers.learned import Learned
from controllers.policy import PolicyError
from controllers.tabulated import Tabulated
from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.files import write_whole
from engine.latency.table_file import LatencyTableError
from engine.plant import Plant
from runs.endings import command
from runs.evaluation import LookupFit, load_lookup
from runs.reporting import policy_map
from runs.reporting.palette import png


def _controller(name_or_path: str, ttft_target: float) -> Controller:
    """The policy, or the table, of that name."""
    learned = Learned(path=name_or_path, ttft_target=ttft_target)
    try:
        learned.policy_file  # noqa: B018 - reads the file
    except PolicyError as refused:
        table = Tabulated(path=name_or_path)
        try:
            table.content  # noqa: B018
        except PolicyError:
            raise refused from None
        return table
    return learned


def main(arguments: Sequence[str] | None = None) -> int:
    """The command. Returns 0, or 2 with the reason on stderr when there is nothing to draw."""
    parser = argparse.ArgumentParser(prog="python -m runs.policy_map", description="Draws what controllers choose.")
    parser.add_argument("policies", nargs="*", metavar="POLICY", help="policies or tables, by path or shipped name")
    parser.add_argument("--engine", default="vicuna_7b_a100", help="a shipped latency table")
    parser.add_argument("--ttft-target", type=float, default=1.0, metavar="S", help="TTFT target, s")
    parser.add_argument("--out", type=Path, default=Path("policy_map.png"), help="PNG to write")
    options = parser.parse_args(arguments)
    try:
        engine, grid = EngineConfig(name=options.engine, latency=options.engine), ActionGrid()
        limits = engine.limits(engine.true_latency())
        plant = Plant(grid, lambda: load_lookup(engine, grid, limits, LookupFit()))
        controllers: list[Controller] = [Analytic(ttft_target=options.ttft_target)]
        controllers += [_controller(policy, options.ttft_target) for policy in options.policies]
        maps = {one.label(): policy_map.choices(one, plant, options.ttft_target) for one in controllers}
    except (PolicyError, LatencyTableError) as error:
        Console(stderr=True).print(str(error), style="red", highlight=False, markup=False, soft_wrap=True)
        return 2
    write_whole(options.out, png(policy_map.draw(maps, plant)))
    Console().print(f"Written: {options.out}", highlight=False, soft_wrap=True)
    return 0


if __name__ == "__main__":
    command(main)
