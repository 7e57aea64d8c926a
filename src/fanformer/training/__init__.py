"""Training runs: configuration, optimizers, schedules, the trainer, and the folder a run leaves behind."""
