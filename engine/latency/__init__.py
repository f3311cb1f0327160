"""Iteration time: measured operator profiles, the composed `LatencyModel`, and the `LookupTable` controllers predict with."""
