"""Checkpoints: complete or absent, one format for every ZeRO stage and any number of ranks."""
