"""The training engine: config, launch, DeepSpeed, loop, checkpoints, metrics, evaluation."""
