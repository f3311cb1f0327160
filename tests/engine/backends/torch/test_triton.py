"""The way of Llama-family models on a GPU; without a GPU its kernels are interpreted, which is slow and exact."""

from __future__ import annotations

import copy
from collections.abc import Callable, Hashable
from functools import cache
from itertools import cycle
from typing import Any

import numpy as np
import pytest
import torch
import transformers

from engine.backends.torch import triton_llama
from engine.backends.torch.compiled import CompiledLlama
from engine.backends.torch.engine import TorchEngine
from engine.backends.torch.graphs import Graphs
from engine.backends.torch.model import PagedModel
from engine.backends.torch.promises import Promises
from engine.backends.torch.table import CacheTable
from engine.backends.torch.triton_llama import TritonLlama
from engine.speculation.allocation import Speculation
from engine.speculation.model import ModelDrafter
from engine.speculation.sampling import Sampling
from tests.engine.backends.torch import models
from tests.engine.backends.torch.models import VOCABULARY, limits, prompts, trees
from tests.engine.core.cases import Figures

pytest.importorskip("triton")

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
HEADS = {"one": (2, 2), "grouped": (4, 2)}
SEQS = 4

# Rows that fill up a graph are computed from memory that was never written, and read by nobody.
pytestmark = pytest.mark.filterwarnings("ignore::RuntimeWarning:triton", "ignore::RuntimeWarning:numpy")


class Replayed(Graphs):
    """Calls what was called first under a key, as a graph replays it, whatever it is given later."""

    def run(self, key: Hashable, function: Callable[[], Any]) -> Any:
        if self.enabled:
            return super().run(key, function)
        if key not in self._known:
            self._known[key] = function, function()  # type: ignore[assignment]
            return self._known[key][1]
        first, result = self._known[key]
        return result.copy_(first())  # type: ignore[attr-defined, operator]


@pytest.fixture(autouse=True)
def _no_other_way(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(CompiledLlama, "supports", staticmethod(lambda *_: False))
    monkeypatch.setattr(TritonLlama, "interpreted", DEVICE.type == "cpu")
    monkeypatch.setattr(triton_llama, "Graphs", Replayed)


@cache
def source(heads: str, noise: float = 0.0) -> Any:
    """A random model; with noise, one that often agrees with it."""
    query, kv = HEADS[heads]
    settings = models._LLAMA | {
        "hidden_size": 16 * query,
        "intermediate_size": 24,
        "num_attention_heads": query,
        "num_key_value_heads": kv,
        "num_hidden_layers": 1 if query == 2 else 2,
    }
    torch.manual_seed(0)
    made = transformers.AutoModelForCausalLM.from_config(transformers.LlamaConfig(**settings)).eval()
    torch.manual_seed(2)
    with torch.no_grad():
        for weight in made.parameters():
            weight += noise * torch.randn_like(weight)
    return made


@cache
def paged(heads: str, noise: float = 0.0, *, fused: bool = True) -> PagedModel:
    blocks = CacheTable(limits()).num_blocks
    made = PagedModel(copy.deepcopy(source(heads, noise)).to(DEVICE), blocks, 4, fused=fused)
    assert isinstance(made.fused, TritonLlama) == fused
    return made


def engine(speculation: Speculation, *, deferring: bool) -> TorchEngine:
    target, drafter = paged("one"), paged("one", 0.03)
    if deferring:
        drafter.defer_to(target)
    return TorchEngine(target, limits(max_num_seqs=SEQS), ModelDrafter(drafter), speculation)


@pytest.mark.parametrize("heads", HEADS)
@pytest.mark.parametrize("largest", [triton_llama.GRAPH_ROWS[-1], 4])
def test_any_batch_gives_the_modules_logits(heads: str, largest: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """Chunks, single tokens and candidates of many requests, in shapes of graphs and in shapes of their own."""
    pair = [paged(heads, fused=fused) for fused in (True, False)]
    monkeypatch.setattr(triton_llama, "GRAPH_ROWS", tuple(size for size in triton_llama.GRAPH_ROWS if size <= largest))
    random = np.random.default_rng(largest)
    table = CacheTable(limits())
    table.tokens[:] = random.integers(0, VOCABULARY, table.tokens.shape)
    table.blocks[:4, :16] = random.permutation(64).reshape(4, 16)
    starts = np.zeros(4, dtype=np.int64)
    for most in (20, 1, 6, 1):
        seats = random.permutation(4)[: random.integers(1, 5)]
        counts = random.integers(1, most + 1, len(seats))
        keep = random.integers(0, counts + 1)
        got, expected = (one.forward(table, seats, starts[seats], counts, keep).cpu() for one in pair)
        np.testing.assert_allclose(got.numpy(), expected.numpy(), atol=1e-4)
        np.testing.assert_array_equal(pair[0].top(got)[:, 0], expected.numpy().argmax(-1))
        starts[seats] += counts


@pytest.mark.parametrize("processors", [1, 8])
def test_tree_nodes_see_their_ancestors_only(processors: int, monkeypatch: pytest.MonkeyPatch) -> None:
    """However many programs share the keys; roots differ, and one request has a chain."""
    pair = [paged("grouped", fused=fused) for fused in (True, False)]
    monkeypatch.setattr(pair[0].fused, "_processors", processors)
    random, nodes = np.random.default_rng(processors), 9
    table = CacheTable(limits())
    table.tokens[:] = random.integers(0, VOCABULARY, table.tokens.shape)
    table.blocks[:3, :16] = np.arange(48).reshape(3, 16)
    seats, roots = np.arange(3), np.array([12, 5, 30])
    for one in pair:
        one.forward(table, seats, 0 * roots, roots, 0 * roots)
    counts, branches = np.full(3, 1 + nodes), trees(roots, nodes, random)
    got, expected = (one.forward(table, seats, roots, counts, counts, branches).cpu() for one in pair)
    np.testing.assert_allclose(got.numpy(), expected.numpy(), atol=1e-4)


@pytest.mark.parametrize(
    "speculation",
    [Speculation(), Speculation(branching=2), Speculation("local", 2), Speculation("global", 2)],
    ids=["chains", "fixed trees", "local trees", "global trees"],
)
def test_promised_candidates_are_the_drafters_tokens(speculation: Speculation, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is drafted on the device unseen is drafted as if it were read at every step; one request is sampled."""
    monkeypatch.setattr(triton_llama, "GRAPH_ROWS", (4, 8, 12))
    asked = prompts((3, 16, 9))
    found = []
    for deferring in (False, True):
        served = engine(speculation, deferring=deferring)
        drawn = Sampling(temperature=0.7, seed=5)
        numbers = [served.submit(prompt, 6, *([drawn] if i == 2 else [])) for i, prompt in enumerate(asked)]
        served.run(3, 12)
        engine_row = Figures(served.state)
        assert engine_row["free_blocks"] == served.limits.total_blocks
        found.append(([served.output(number) for number in numbers], served.state.requests["accepted"].tolist()))
    assert found[0] == found[1]
    for prompt, output in zip(asked[:2], found[0][0], strict=False):
        ids = torch.tensor(prompt)[None]
        with torch.inference_mode():
            exact = copy.deepcopy(source("one")).double()
            out = exact.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=6, do_sample=False)
        assert output == out[0, len(prompt) :].tolist()


def test_what_is_prepared_is_not_captured_while_serving(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(triton_llama, "GRAPH_ROWS", (4, 12))
    monkeypatch.setattr(triton_llama, "_MOST_SPLITS", 2)
    served = engine(Speculation(branching=2), deferring=True)
    ways = [served.model.fused, served.drafter._runner.fused]  # type: ignore[attr-defined]
    for way in ways:
        way.graphs.forget()
    served.prepare()
    captured = [set(way.graphs._known) for way in ways]
    assert {size for size, *_ in captured[0]} == {4, 12}
    for prompt in prompts((3, 16, 9, 5, 2)):
        served.submit(prompt, 5)
    turns = cycle(((0, 64), (2, 3), (3, 4)))
    while served.step(*next(turns)):
        pass
    assert [set(way.graphs._known) for way in ways] == captured


def test_a_gpu_that_captures_no_graph_is_launched_kernel_by_kernel(
    monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def fails(*_: Any) -> None:
        raise RuntimeError("operation not permitted")

    graphs = Graphs(torch.device("cpu"))
    graphs.enabled = True
    monkeypatch.setattr(graphs, "_capture", fails)
    turns = iter(range(3))
    assert [graphs.run("key", lambda: next(turns)) for _ in range(3)] == [0, 1, 2]
    assert "operation not permitted" in caplog.text
    assert len(caplog.records) == 1


def test_promises_are_read_once_and_begin_anew() -> None:
    promises = Promises(5, DEVICE)
    first, second = promises.make(2), promises.make(1)
    promises.values[:3] = torch.tensor([7, 8, 9])
    promises.settle()
    assert promises.known(np.array([[-1 - second[0], 4], [-1 - first[1], -1 - first[0]]])).tolist() == [[9, 4], [8, 7]]
    assert promises.make(5).tolist() == [0, 1, 2, 3, 4]
    with pytest.raises(RuntimeError, match="room for 5"):
        promises.make(1)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device: nothing is waited for on a CPU")
@pytest.mark.parametrize("candidates", [0, 4])
def test_an_iteration_waits_for_the_device_once(candidates: int) -> None:
    served = engine(Speculation(), deferring=True)
    served.prepare()
    for prompt in prompts((3, 30, 9)):
        served.submit(prompt, 64)
    for _ in range(4):
        served.step(candidates, 64)
    torch.cuda.set_sync_debug_mode("error")
    try:
        for _ in range(3):
            served.step(candidates, 64)
    finally:
        torch.cuda.set_sync_debug_mode("default")
    assert isinstance(served.model.fused, TritonLlama)
    assert served.model.fused.graphs.enabled
    assert len(served.model.fused.graphs) > 0
