"""The training engine: config, launch, DeepSpeed, loop, schedules, checkpoints, metrics, evaluation. Knows no model and no dataset."""
