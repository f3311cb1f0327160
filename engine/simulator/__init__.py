"""The simulator: compiled event loops over the shared scheduler, acceptance, iteration time, and replay."""
