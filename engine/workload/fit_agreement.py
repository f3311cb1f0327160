"""Fit the agreement model to acceptance logs: `python -m engine.workload.fit_agreement --logs FILE...`.

Fits by maximum likelihood on half of the questions and prints its prediction of the other half, then the parameters
fitted to all of them, as `markov.DRAFTERS` holds them. Censoring is exact: after a draft accepted as a whole the next
position is unobserved and adds nothing to the likelihood. Draft lengths depend only on earlier observations, so leaving
them out of the likelihood adds no bias.
"""

from __future__ import annotations

import argparse
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from numba import njit
from numpy.polynomial.legendre import leggauss
from numpy.typing import NDArray
from scipy.optimize import brentq, minimize
from scipy.special import expit, logsumexp

from engine.command import run
from engine.workload.acceptance_log import AcceptanceLog, forward, read_acceptance_log
from engine.workload.agreement import IidAgreement
from engine.workload.markov import MarkovChain

_NODES = 20
_REPEATS = 20
LOOP_RUN = 20
# Much below this, a tree's narrowing would be explained by positions that agree every other time.
_MOMENTUM = (-1.5, 5.0)


def log_likelihood(model: MarkovChain, log: AcceptanceLog) -> float:
    """Log-likelihood of all observed positions; each turn's quality is integrated out by quadrature."""
    return _log_likelihood(model, *log.observed())


def fit_agreement(log: AcceptanceLog) -> MarkovChain:
    """The maximum-likelihood `MarkovChain` (its rank and confidence settings stay at their defaults)."""
    seen, offset = log.observed()

    def loss(theta: NDArray[np.float64]) -> float:
        # A vanishing penalty keeps parameters that the data do not pin down away from the edges.
        return -_log_likelihood(_model(theta), seen, offset) + 1e-3 * float(theta @ theta)

    starts = [(0.0, 3.0, -1.5, 1.5, 3.0, 0.3), (0.0, 2.0, -0.5, 1.5, 0.5, 0.0)]
    fits = [
        minimize(loss, start, method="L-BFGS-B", bounds=[*[(-6.0, 6.0)] * 5, _MOMENTUM]) for start in np.array(starts)
    ]
    return _model(min(fits, key=lambda fit: fit.fun).x)


def fit_chain_equivalent(log: AcceptanceLog) -> MarkovChain:
    """`fit_agreement`, with its base moved until drafts of the log's constant depth have the log's accepted length.

    For tree drafters: their acceptance first rises above that of a chain with depth-independent agreement, and then
    falls below it as the tree narrows. The chain cannot follow this, but it can emit as many tokens per iteration.
    """
    fitted, target = fit_agreement(log), logged_steps(log).accepted.mean()
    shift = brentq(lambda by: simulated_steps(fitted.shifted(by), log).accepted.mean() - target, -2.0, 2.0, xtol=1e-3)
    return fitted.shifted(shift)


def fit_iid(log: AcceptanceLog) -> MarkovChain:
    """The geometric baseline: one agreement probability for every position of every request."""
    seen, _ = log.observed()
    return IidAgreement(alpha=float((seen == 1).sum() / (seen >= 0).sum())).chain


@dataclass(frozen=True)
class Steps:
    """Verify steps: accepted and drafted tokens, and the turn each belongs to."""

    accepted: NDArray[np.int64]
    drafted: NDArray[np.int64]
    turn: NDArray[np.int64]

    def tokens_per_iteration(self, candidates: int) -> float:
        """Mean of min(accepted, c) + 1 over the steps that drafted at least c tokens."""
        deep = self.drafted >= candidates
        return float(np.minimum(self.accepted[deep], candidates).mean() + 1.0) if deep.any() else float("nan")

    def conditional_acceptance(self, position: int) -> tuple[float, int]:
        """P(draft position accepted | all before it were), and the number of steps that could tell."""
        asked = (self.accepted >= position) & (self.drafted > position)
        return (float((self.accepted[asked] > position).mean()) if asked.any() else float("nan")), int(asked.sum())

    def means_by_turn(self) -> NDArray[np.float64]:
        """Mean accepted tokens of each turn."""
        return np.bincount(self.turn, weights=self.accepted) / np.bincount(self.turn)


def logged_steps(log: AcceptanceLog) -> Steps:
    """The steps of a log as they were."""
    return Steps(
        np.concatenate([turn.accepted for turn in log.turns]),
        np.concatenate([turn.drafted for turn in log.turns]),
        np.repeat(np.arange(len(log.turns)), [turn.accepted.size for turn in log.turns]),
    )


def simulated_steps(model: MarkovChain, log: AcceptanceLog, candidates: int | None = None, seed: int = 0) -> Steps:
    """Steps of the model on the log's output lengths, under the log's own rule for draft lengths (or a constant one).

    The rule is recognised by the log: constant, or Hugging Face's heuristic (start at 5, +2 after a draft accepted as a
    whole, else -1, at least 1).
    """
    lengths = np.tile([turn.new_tokens for turn in log.turns], _REPEATS).astype(np.int32)
    drawn = model.draw(seed, np.arange(lengths.size), lengths)
    drafted = np.concatenate([turn.drafted for turn in log.turns])
    constant = candidates or (int(drafted[0]) if (drafted == drafted[0]).all() else 0)
    return Steps(*_decode(drawn.run_length, np.concatenate(([0], np.cumsum(lengths))), constant))


def report(name: str, model: MarkovChain, baseline: MarkovChain, test: AcceptanceLog) -> str:
    """The held-out comparison as text."""
    logged, drawn = logged_steps(test), simulated_steps(model, test)
    flat = simulated_steps(baseline, test)
    deepest = int(logged.drafted.max())
    lines = [f"{name}: held out {len(test.turns)} turns, {logged.accepted.size} steps"]
    lines.append("  c  tokens/iteration: log  model  error  iid | model at fixed c")
    for c in range(1, min(8, deepest) + 1):
        values = [steps.tokens_per_iteration(c) for steps in (logged, drawn, flat)]
        fixed = simulated_steps(model, test, c).tokens_per_iteration(c)
        error = values[1] / values[0] - 1.0
        lines.append(f"  {c}  {values[0]:21.3f} {values[1]:6.3f} {error:+6.1%} {values[2]:5.3f} | {fixed:.3f}")
    lines.append("  draft position, accepted given all before: log  model  iid  (steps)")
    for position in range(min(10, deepest)):
        (seen, count), (ours, _), (base, _) = (s.conditional_acceptance(position) for s in (logged, drawn, flat))
        lines.append(f"  {position}  {seen:40.3f} {ours:6.3f} {base:6.3f}  ({count})")
    rows = {"log": logged, "model": drawn, "iid": flat}
    lines.append("  mean accepted a step: " + ", ".join(f"{k} {s.accepted.mean():.3f}" for k, s in rows.items()))
    lines.append("  std of turns' means: " + ", ".join(f"{k} {s.means_by_turn().std():.3f}" for k, s in rows.items()))
    lines.append(
        "  quartiles of turns' means: "
        + ", ".join(f"{k} {np.round(np.quantile(s.means_by_turn(), (0.25, 0.5, 0.75)), 2)}" for k, s in rows.items())
    )
    positions = int((test.observed()[0] >= 0).sum())
    ours, base = log_likelihood(model, test) / positions, log_likelihood(baseline, test) / positions
    lines.append(f"  log-likelihood a position: model {ours:.4f}, iid {base:.4f} ({positions} positions)")
    return "\n".join(lines)


def main() -> None:
    """Print, for each log, the held-out comparison and the parameters fitted to all of it."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--logs", type=Path, nargs="+", required=True)
    parser.add_argument("--depth", type=int, help="draft length of logs without k_drafted")
    arguments = parser.parse_args()
    for path in arguments.logs:
        whole = read_acceptance_log(path, arguments.depth)
        log = without_loops(whole)
        test = held_out(log)
        train = log.subset(~test)
        chain = "k_drafted" in path.read_text(encoding="utf-8")
        fit = fit_agreement if chain else fit_chain_equivalent
        print(f"{path.name}: {len(whole.turns) - len(log.turns)} looping turns left out, {fit.__name__}")
        print(report(path.name, fit(train), fit_iid(train), log.subset(test)))
        fitted = fit(log)
        print(f"  fitted to all {len(log.turns)} turns: {fitted!r}; mean agreement {fitted.mean_agreement:.3f}\n")


def without_loops(log: AcceptanceLog) -> AcceptanceLog:
    """The turns in which no step accepted `LOOP_RUN` tokens or more.

    Greedy decoding now and then repeats itself until the output limit, and a drafter predicts a loop perfectly. Two of
    240 turns of the 68M log do; they would bend every parameter of a model that has no state for them.
    """
    return log.subset([int(turn.accepted.max()) < LOOP_RUN for turn in log.turns])


def held_out(log: AcceptanceLog) -> NDArray[np.bool_]:
    """(T,) every second question; both turns of a question stay on one side."""
    questions = sorted({turn.question_id for turn in log.turns})
    return np.isin([turn.question_id for turn in log.turns], questions[1::2])


def _log_likelihood(model: MarkovChain, seen: NDArray[np.int8], offset: NDArray[np.int64]) -> float:
    # Gauss-Legendre in v with quality = 3 v^2 - 2 v^3: nodes crowd at both ends, where the unusual turns live.
    nodes, weights = leggauss(_NODES)
    v = 0.5 * (nodes + 1.0)
    given = _by_quality(seen, offset, model.easy_share, model.persistence, model.agree(v * v * (3.0 - 2.0 * v)))
    return float(logsumexp(given, axis=1, b=weights * 3.0 * v * (1.0 - v)).sum())


def _model(theta: NDArray[np.float64]) -> MarkovChain:
    """Parameters from an unbounded vector."""
    base, concentration, share, easy, persistence, momentum = (float(value) for value in theta)
    return MarkovChain(
        base_mean=float(expit(base)),
        base_concentration=float(np.exp(concentration)),
        easy_share=float(expit(share)),
        easy_logit=float(np.logaddexp(0.0, easy)),
        persistence=float(expit(persistence)),
        momentum=float(np.clip(momentum, -5.0, 5.0)),
    )


@njit(cache=True, error_model="numpy")
def _by_quality(seen, offset, easy_share, persistence, agree):
    """(T, Q) log-likelihood of each turn given each quality's `agree` (Q, 2, 2)."""
    out = np.empty((offset.size - 1, agree.shape[0]))
    scratch = np.empty((seen.size, 2, 2))
    for turn in range(offset.size - 1):
        begin, end = offset[turn], offset[turn + 1]
        for node in range(agree.shape[0]):
            out[turn, node] = forward(seen[begin:end], easy_share, persistence, agree[node], scratch[begin:end])
    return out


@njit(cache=True, error_model="numpy")
def _decode(run_length, offset, constant):
    """Decode every request: constant draft length, or Hugging Face's heuristic where `constant` is 0."""
    accepted = np.empty(run_length.size, dtype=np.int64)
    drafted = np.empty(run_length.size, dtype=np.int64)
    turn = np.empty(run_length.size, dtype=np.int64)
    steps = 0
    for request in range(offset.size - 1):
        position = offset[request] + 1
        length = constant if constant > 0 else 5
        while position < offset[request + 1]:
            run = run_length[position]
            accepted[steps] = min(run, length)
            drafted[steps] = length
            turn[steps] = request
            position += accepted[steps] + 1
            if constant == 0:
                length = length + 2 if accepted[steps] == length else max(1, length - 1)
            steps += 1
    return accepted[:steps], drafted[:steps], turn[:steps]


if __name__ == "__main__":
    run(main)
