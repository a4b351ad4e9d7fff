"""Bagel: one decoder that reads text and images and draws images (arXiv 2505.14683)."""
