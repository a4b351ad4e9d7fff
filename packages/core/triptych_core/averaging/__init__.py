"""Averages of checkpoints, streamed from their files into a Hugging Face directory."""
