"""The compiled network computes what torch computes."""

from __future__ import annotations

import itertools

import numpy as np
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from controllers.network import ACTIVATIONS, LARGEST_INPUT, Network, forward, network_row, new_network_memory

MODULES = {"tanh": nn.Tanh, "relu": nn.ReLU}


def _made(
    width: int, hidden: int, layers: list[int], activation: str, seed: int
) -> tuple[nn.LSTM | None, nn.Module, Network]:
    torch.manual_seed(seed)
    lstm = nn.LSTM(width, hidden) if hidden else None
    widths = [hidden or width, *layers]
    parts: list[nn.Module] = []
    for ins, outs in itertools.pairwise(widths):
        parts += [nn.Linear(ins, outs), MODULES[activation]()]
    net = nn.Sequential(*parts[:-1])
    flat = [
        array
        for layer in net
        if isinstance(layer, nn.Linear)
        for array in (layer.weight.detach().T.numpy().ravel(), layer.bias.detach().numpy())
    ]
    weights = np.zeros(0, dtype=np.float32)
    if lstm is not None:
        bias = lstm.bias_ih_l0 + lstm.bias_hh_l0
        rows = (lstm.weight_ih_l0.T.ravel(), lstm.weight_hh_l0.T.ravel(), bias)
        weights = np.concatenate([row.detach().numpy() for row in rows])
    rng = np.random.default_rng(seed)
    network = Network(
        mean=rng.normal(size=width).astype(np.float32),
        scale=rng.uniform(0.5, 2.0, width).astype(np.float32),
        lstm=weights,
        hidden=hidden,
        sizes=np.array(widths),
        weights=np.concatenate(flat),
        activation=ACTIVATIONS.index(activation),
    )
    return lstm, net, network


@given(
    width=st.integers(1, 9),
    hidden=st.sampled_from([0, 1, 5]),
    layers=st.lists(st.integers(1, 12), min_size=1, max_size=3),
    activation=st.sampled_from(ACTIVATIONS),
    seed=st.integers(0, 999),
)
@settings(max_examples=40)
def test_a_sequence_of_inputs_gives_what_torch_gives(
    width: int, hidden: int, layers: list[int], activation: str, seed: int
) -> None:
    lstm, net, network = _made(width, hidden, layers, activation, seed)
    memory = network_row.py_func(new_network_memory(network, 1), 0)
    inputs = np.random.default_rng(seed).normal(scale=8.0, size=(4, width)).astype(np.float32)
    state = None
    for row in inputs:
        normal = np.clip((row - network.mean) * network.scale, -LARGEST_INPUT, LARGEST_INPUT)
        values = torch.as_tensor(normal)[None]
        if lstm is not None:
            values, state = lstm(values, state)
        memory.values[:width] = row
        forward(network, memory)
        np.testing.assert_allclose(memory.values[: layers[-1]], net(values)[0].detach(), rtol=2e-4, atol=2e-5)
