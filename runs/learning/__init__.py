"""Training policies: environments, learners, checkpoints and what is measured on the way."""
