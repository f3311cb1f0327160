"""Acceptance rate of one request's candidates, as observed by the engine."""

from engine.compiled import kernel

PRIOR_RATE = 0.7
PRIOR_COUNT = 4.0
"""Prior acceptance rate of a request, and its weight in candidates."""


@kernel
def own_acceptance(request):
    """Share accepted of those candidates of a request whose predecessors were all accepted, smoothed by a prior."""
    looked_at = request.accepted + request.rejections
    return (request.accepted + PRIOR_RATE * PRIOR_COUNT) / (looked_at + PRIOR_COUNT)
