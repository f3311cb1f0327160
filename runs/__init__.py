"""The command-line apps: evaluate, train, profile, report, export, serve."""
