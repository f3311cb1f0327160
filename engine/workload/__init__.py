"""Workloads: arrivals, lengths and drafter agreement, drawn from a seed or read from a file before a run starts."""

from engine.workload.workload import Workload, WorkloadError

__all__ = ["Workload", "WorkloadError"]
