"""Bounds that look at the future: clairvoyant policies, which run on the simulator alone."""
