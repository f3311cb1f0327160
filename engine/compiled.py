"""The decorator of every compiled function in the serving loop."""

from collections.abc import Callable
from functools import partial
from typing import Any

import numba

_compile: Callable[..., Any] = partial(numba.njit, cache=True, error_model="numpy", _nrt=False)

kernel: Callable[..., Any] = _compile(forceinline=True)
"""Compile a function that allocates nothing.

Without numba's reference counting (`_nrt=False`), which would touch the counters of all the arrays of a `State` at
every call, the serving loop is five times faster. The price: such a function must not create an array.
"""

outlined: Callable[..., Any] = _compile()
"""The same for a large function that is called once an iteration: its code is not repeated in every loop that calls it,
which would take seconds more to compile for each."""
