"""Candidate tokens and their lossless verification: drafters, sampling distributions, acceptance rules."""
