"""Which ranks hold which rows, experts and cuts of matrices."""
