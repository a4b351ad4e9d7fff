"""What a run needs and how long a step takes, before it starts and when memory runs out."""
