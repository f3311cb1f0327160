"""Code that the documentation shows runs as it stands there."""

from __future__ import annotations

import linecache
import re
import sys
from pathlib import Path
from types import ModuleType

import pytest

from engine.config import EngineConfig
from engine.core.action import ActionGrid
from engine.latency.lookup import LookupTable
from engine.plant import Plant
from engine.simulator.simulator import Simulator
from engine.workload.arrivals import PoissonArrivals
from engine.workload.lengths import NamedLengths
from engine.workload.source import SyntheticSource
from runs.simulated import serve

DOCS = Path(__file__).resolve().parents[1] / "docs"


def _unused() -> LookupTable:
    raise AssertionError("this controller predicts nothing")


def _module(code: str, folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """A user's own module in a folder."""
    file = folder / "while_fast.py"
    file.write_text(code, encoding="utf-8")
    made = ModuleType("while_fast")
    made.__file__ = str(file)
    monkeypatch.setitem(sys.modules, "while_fast", made)
    linecache.checkcache()
    exec(compile(code, str(file), "exec"), made.__dict__)
    return made


def _candidates(made: ModuleType) -> set[int]:
    """The c that the module's controller chose in a run."""
    source = SyntheticSource(
        name="few", arrivals=PoissonArrivals(rate=12.0), lengths=NamedLengths(name="lmsys_chat_1m"), num_requests=60
    )
    workload = source.draw(0)
    config = EngineConfig(name="vicuna_7b_a100", latency="vicuna_7b_a100")
    simulator = Simulator(config, [workload], ttft_target=1.0)
    served = serve(simulator, workload, made.WhileFast(fast_s=0.02), Plant(ActionGrid(), _unused), recording=True)
    assert simulator.state.totals["finished"][0] == 60
    return set(served.iterations["candidates"].tolist())


def test_the_controller_in_the_docs_governs_an_engine_also_after_an_edit(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Compiled code is kept between runs; that of a file that was edited is not used again."""
    code = re.findall(r"```python\n(.*?)```", (DOCS / "controllers.md").read_text(encoding="utf-8"), re.S)[0]
    assert _candidates(_module(code, tmp_path, monkeypatch)) == {0, 3}
    assert _candidates(_module(code.replace("return 3 if", "return 5 if"), tmp_path, monkeypatch)) == {0, 5}
