"""Checks of a configuration on its first rows, before the long run: `--verify`."""
