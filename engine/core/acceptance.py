"""How often the candidates of one request are accepted, as an engine can tell from serving it."""

from engine.compiled import kernel

PRIOR_RATE = 0.7
PRIOR_COUNT = 4.0
"""A request's acceptance rate before any of its candidates was verified, and how many candidates that counts as."""


@kernel
def own_acceptance(request):
    """Of a request's candidates that all those before them were accepted of, the share that was accepted too."""
    looked_at = request.accepted + request.rejections
    return (request.accepted + PRIOR_RATE * PRIOR_COUNT) / (looked_at + PRIOR_COUNT)
