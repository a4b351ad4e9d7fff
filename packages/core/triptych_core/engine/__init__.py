"""The engines: DeepSpeed's, derived from our configuration, and our own for ZeRO-0."""
