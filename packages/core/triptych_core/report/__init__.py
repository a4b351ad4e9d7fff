"""The run report: one HTML file, made from what a run folder holds."""
