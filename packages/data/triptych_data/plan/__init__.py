"""Which samples form which pack at which step: a pure function of indexes and a seed."""
