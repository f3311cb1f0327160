"""One file per idea of how to choose c and n. A controller sees telemetry and answers with an action."""
