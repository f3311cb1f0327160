"""A real engine behind an OpenAI-compatible HTTP interface: `runs.serve` puts the parts together."""
