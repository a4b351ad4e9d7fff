"""Processes that work for the trainer or a command, none of which can hang unseen."""
