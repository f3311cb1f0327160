"""From what a controller chooses to the schedules that serving engines load."""
