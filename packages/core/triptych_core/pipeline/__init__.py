"""A recipe: steps that start from each other's outputs, run by one command that can be repeated."""
