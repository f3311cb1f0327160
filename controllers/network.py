"""A small neural network in compiled code: normalisation, one LSTM layer if wanted, fully connected layers."""

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from engine.compiled import kernel

ACTIVATIONS = ("tanh", "relu")
LARGEST_INPUT = 10.0
"""Normalised inputs are clipped to this on either side."""


class Network(NamedTuple):
    """Weights, float32.

    mean, scale: (F,) subtracted from the input and multiplied with it · lstm: flat [(F, 4 H) input weights, (H, 4 H)
    recurrent weights, (4 H,) bias], gates in the order input, forget, cell, output; empty without · hidden: H, 0
    without · sizes: (L + 1,) widths of the fully connected layers, the input's first · weights: flat, for each layer
    (in, out) weights and (out,) bias · activation: index into `ACTIVATIONS`; the last layer has none.
    """

    mean: NDArray[np.float32]
    scale: NDArray[np.float32]
    lstm: NDArray[np.float32]
    hidden: int
    sizes: NDArray[np.int64]
    weights: NDArray[np.float32]
    activation: int


class NetworkMemory(NamedTuple):
    """Memory of forward passes, float32, one row per instance: two layers' values, the LSTM's state, cell and gates."""

    values: NDArray[np.float32]
    others: NDArray[np.float32]
    state: NDArray[np.float32]
    cell: NDArray[np.float32]
    gates: NDArray[np.float32]


def new_network_memory(network: Network, instances: int) -> NetworkMemory:
    """Zeros, for the beginning of an episode."""
    widest = max(int(network.sizes.max()), len(network.mean), network.hidden)
    hidden = max(1, network.hidden)

    def zeros(size: int) -> NDArray[np.float32]:
        return np.zeros((instances, size), dtype=np.float32)

    return NetworkMemory(zeros(widest), zeros(widest), zeros(hidden), zeros(hidden), zeros(4 * hidden))


@kernel
def network_row(memory, i):
    """Return the memory of instance `i`."""
    return NetworkMemory(memory.values[i], memory.others[i], memory.state[i], memory.cell[i], memory.gates[i])


@kernel
def _sigmoid(x):
    return np.float32(1.0) / (np.float32(1.0) + math.exp(-x))


@kernel
def _recur(network, memory):
    """One step of the LSTM on `memory.values`, which then holds the new hidden state."""
    hidden = network.hidden
    inputs = network.mean.shape[0]
    gates = memory.gates
    at = (inputs + hidden) * 4 * hidden
    for g in range(4 * hidden):
        gates[g] = network.lstm[at + g]
    for i in range(inputs + hidden):
        x = memory.values[i] if i < inputs else memory.state[i - inputs]
        row = i * 4 * hidden
        for g in range(4 * hidden):
            gates[g] += x * network.lstm[row + g]
    for h in range(hidden):
        kept = _sigmoid(gates[hidden + h]) * memory.cell[h]
        memory.cell[h] = kept + _sigmoid(gates[h]) * math.tanh(gates[2 * hidden + h])
        memory.state[h] = _sigmoid(gates[3 * hidden + h]) * math.tanh(memory.cell[h])
    for h in range(hidden):
        memory.values[h] = memory.state[h]


@kernel
def forward(network, memory):
    """Run the network on the F numbers in `memory.values`, of one instance, and write its outputs there."""
    values, others = memory.values, memory.others
    for i in range(network.mean.shape[0]):
        x = (values[i] - network.mean[i]) * network.scale[i]
        values[i] = min(max(x, -LARGEST_INPUT), LARGEST_INPUT)
    if network.hidden > 0:
        _recur(network, memory)
    at = 0
    layers = network.sizes.shape[0] - 1
    for layer in range(layers):
        ins, outs = network.sizes[layer], network.sizes[layer + 1]
        bias = at + ins * outs
        for o in range(outs):
            others[o] = network.weights[bias + o]
        for i in range(ins):
            x = values[i]
            row = at + i * outs
            for o in range(outs):
                others[o] += x * network.weights[row + o]
        at = bias + outs
        last = layer == layers - 1
        for o in range(outs):
            x = others[o]
            if not last:
                x = math.tanh(x) if network.activation == 0 else max(x, np.float32(0.0))
            values[o] = x
