"""Controllers, one file per method of choosing c and n. A controller maps telemetry to an action."""
