"""One scheduler for every backend: request table, KV blocks, plan, commit, telemetry and metrics."""
