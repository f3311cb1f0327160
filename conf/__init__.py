"""Hydra configuration: one folder per group (engine, workload, controller, env, experiment, logger)."""
