"""The language-model head, owner of the loss."""

from torch import Tensor, nn

from triptych_kernels import linear_cross_entropy


class LossHead(nn.Linear):
    """Takes the place of `lm_head` and keeps its weight, so names and tied storage stay.

    The loss is computed here because under ZeRO-3 a weight is whole only inside the forward of the
    module that owns it.
    """

    def __init__(self, stock: nn.Linear) -> None:
        nn.Module.__init__(self)  # not Linear's: the weight exists already
        self.in_features = stock.in_features
        self.out_features = stock.out_features
        self.weight = stock.weight
        self.bias = stock.bias

    def forward(
        self,
        hidden_states: Tensor,
        shift_labels: Tensor | None = None,
        num_targets: int | None = None,
        weights: Tensor | None = None,
    ) -> Tensor:
        """hidden_states (…, H) → logits (…, V); with shift_labels (…) → summed loss () fp32.

        num_targets says how many labels are not -100, so that rows without a target can be left
        out without asking the device. weights (…) multiply each row's loss.
        """
        if shift_labels is None:
            return super().forward(hidden_states)
        return linear_cross_entropy(
            hidden_states.flatten(0, -2),
            self.weight,
            shift_labels.flatten(),
            bias=self.bias,
            num_targets=num_targets,
            weights=None if weights is None else weights.flatten(),
        )
