"""What every family's forward returns."""

from typing import NamedTuple

from torch import Tensor


class LossOutput(NamedTuple):
    """Summed loss of one packed batch; dividing by all targets of the window is for the loop."""

    loss_sum: Tensor
    """() fp32, summed over the targets, connected to the graph even when there are none."""
    num_targets: int
    """Targets in the batch (`shift_labels != -100`), known on the host: no sync."""
    metrics: dict[str, Tensor]
    """Further tensors to log, by name, left on the device: () are sums over targets like the loss,
    tables are counts. Each is summed over the window and all ranks."""
    losses: Tensor | None = None
    """(N,) fp32, detached, of a batch of samples: what each adds to the sum."""
