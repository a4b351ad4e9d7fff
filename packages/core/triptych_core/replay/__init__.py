"""`--replay`: the batch of a step once more, without an update, looked at closely."""
