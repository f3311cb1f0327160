"""Who says how long a batch took and how many candidates were accepted: the simulator, or a real engine."""
