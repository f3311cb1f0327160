"""Governor's sweeps for Hydra, found by Hydra because of where they are: alternatives, and worker processes."""
