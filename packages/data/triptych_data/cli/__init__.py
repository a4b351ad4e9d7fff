"""The `triptych-data` command."""
