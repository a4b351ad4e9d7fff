"""The engines: our own, and DeepSpeed's for what is offloaded or cut by tensor parallelism."""
