"""The decorator of every compiled function in the serving loop."""

from collections.abc import Callable
from typing import Any

import numba

kernel: Callable[..., Any] = numba.njit(cache=True, error_model="numpy", forceinline=True, _nrt=False)  # type: ignore[call-overload]
"""Compile a function that allocates nothing.

Without numba's reference counting (`_nrt=False`), which would touch the counters of all the arrays of a `State` at
every call, the serving loop is five times faster. The price: such a function must not create an array.
"""
