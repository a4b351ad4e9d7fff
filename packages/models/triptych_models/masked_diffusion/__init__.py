"""Masked diffusion of text: rows with masked tokens, and answers that are filled in."""
