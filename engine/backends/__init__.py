"""Backends, which supply batch times and accepted candidates: the simulator, or a real engine."""
