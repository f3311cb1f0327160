"""Clairvoyant bounds: policies that know the future and run only on the simulator."""
