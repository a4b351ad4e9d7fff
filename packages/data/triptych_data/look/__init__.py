"""What shows what shards hold: figures, plots, pages."""
