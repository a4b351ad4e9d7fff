"""Held-out loss and scored answers, while or after training."""
