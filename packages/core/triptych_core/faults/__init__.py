"""What goes wrong while a run goes on: signals, hangs, lost ranks, losses that are no numbers."""
