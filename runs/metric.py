"""The figure of a run that a sweeper may optimize."""

import difflib
from collections.abc import Mapping
from typing import Any

from runs.endings import MistakeError


def optimized(figures: Mapping[str, Any], key: str, file: str) -> float:
    """The number `figures[key]`; NaN where it has no value.

    Raises:
        MistakeError: `figures`, which `file` holds, have no such number.
    """
    numbers = {name: value for name, value in figures.items() if value is None or isinstance(value, int | float)}
    if key not in numbers:
        near = difflib.get_close_matches(key, numbers, n=1)
        hint = f"did you mean {near[0]}?" if near else f"it has {', '.join(numbers)}"
        raise MistakeError(f"optimized_metric={key}: no number of that name in {file}; {hint}")
    value = numbers[key]
    return float("nan") if value is None else float(value)
