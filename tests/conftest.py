"""What must hold before any test runs."""

import torch

# Autograd decides at its first backward whether it starts threads, and finds devices for them once
# torch.compile was used: after that no forked rank (tests/ranks.py) could run a backward.
torch.ones((), requires_grad=True).backward()
