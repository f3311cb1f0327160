"""Iteration time: operator profiles, the composed `LatencyModel`, and the `LookupTable` that controllers use."""
