"""Cost of a decision: the reported objective (`engine.core.objective`), charged as time passes.

Every term is charged as it accrues. Between its first and last token a request is charged 1 / (output - 1) TPOT seconds
per second. When its deadline passes without a first token, the violation is charged, and from then on lateness until
the first token. The rewards of an episode that serves all requests therefore sum to minus the number of requests times
the objective, whatever the decisions in between. Neither delaying nor reordering work hides any cost.

A truncated episode is charged for unfinished requests (`unfinished_cost`), so that dropping requests does not pay.
"""

import numpy as np
from numpy.typing import NDArray

from engine.core.objective import Prices, charged
from engine.core.state import FINISHED, State

TERMS = ("tpot", "violation", "lateness", "unfinished")
"""The reward's terms in the order in which `info["reward_terms"]` holds them; each is a cost, so >= 0."""


def unfinished_cost(state: State, i: int, arrived: NDArray[np.void], prices: Prices) -> float:
    """Cost of the requests that have arrived at instance `i` and are not finished, as if served badly from now on.

    Missing tokens are charged at twice the TPOT target or twice the request's own pace, whichever is slower. A request
    without a first token is also charged a violation, unless it was charged one already, and one more `ttft_target` of
    lateness.
    """
    instance = state.instances[i]
    rows = arrived[arrived["phase"] != FINISHED]
    if len(rows) == 0:
        return 0.0
    started = rows["generated"] > 0
    owed = np.where(started, (rows["output"] - rows["generated"]) / np.maximum(rows["output"] - 1, 1), 1.0)
    with np.errstate(invalid="ignore"):
        pace = (instance["now"] - rows["first_token"]) / np.maximum(rows["generated"] - 1, 1)
    pace = 2.0 * np.fmax(pace, prices.tpot_target) / prices.tpot_target
    waiting = int((~started).sum())
    not_yet_violated = waiting - int(instance["overdue"])
    return float((owed * pace).sum() + waiting * prices.lateness + not_yet_violated * prices.violation)


def episode_summary(state: State, i: int, arrived: NDArray[np.void], prices: Prices) -> dict[str, float]:
    """The reported figures of instance `i` so far, over requests that have their first token (TPOT: finished ones).

    `arrived` are the rows of its requests that have arrived.
    """
    done = arrived[arrived["phase"] == FINISHED]
    long = done[done["output"] > 1]
    tpot = (long["last_token"] - long["first_token"]) / (long["output"] - 1)
    on_time = arrived["first_token"] <= arrived["arrival"] + arrived["ttft_target"]
    return {
        "requests": float(len(arrived)),
        "requests_finished": float(len(done)),
        "tpot_mean_s": float(tpot.mean()) if len(tpot) else float("nan"),
        "ttft_attainment": float(on_time.mean()) if len(arrived) else float("nan"),
        "objective": charged(state, i, prices) / len(arrived) if len(arrived) else float("nan"),
        "duration_s": float(state.instances["now"][i]),
    }
