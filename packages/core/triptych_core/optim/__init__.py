"""Parameter groups, optimizers, schedules, and where parameters lie in flat masters."""
