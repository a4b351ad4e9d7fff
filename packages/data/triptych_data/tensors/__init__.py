"""Samples of tensors: latents and features that were computed once, read instead of computed."""
