"""Shards and their indexes: written, read, checked, and made anew."""
