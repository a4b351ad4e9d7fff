"""A projector that makes one token of m x m neighbouring features.

Their m² vectors become one (pixel unshuffle; InternVL 1.5, arXiv 2404.16821, section 3.1), then
come LayerNorm and two layers with GELU between them. For the concatenation u (m² C) of a block of
features, row by row:

    token = W_2 gelu(W_1 norm(u) + b_1) + b_2
"""

import torch.nn.functional as F
from torch import Tensor, nn

from .flops import Layer

EPS = 1e-5


class PixelUnshuffle(nn.Module):
    """Features (N, side², C) of N images to (N, (side / factor)², H), factor a divisor of side."""

    def __init__(self, width: int, hidden_size: int, side: int, factor: int) -> None:
        super().__init__()
        self.side, self.factor = side, factor
        self.norm = nn.LayerNorm(width * factor**2, EPS)
        self.linear_1 = nn.Linear(width * factor**2, hidden_size)
        self.linear_2 = nn.Linear(hidden_size, hidden_size)

    @staticmethod
    def check(hidden_size: int, side: int, factor: int) -> None:
        """Raise ValueError for a factor that cannot be."""
        if not (isinstance(factor, int) and factor > 0 and side % factor == 0):
            raise ValueError(
                f"model.path: config.json's projector.factor must divide the {side} patches of a "
                f"side, got {factor}; take another, or another tower"
            )

    @property
    def num_tokens(self) -> int:
        """Tokens of an image."""
        return (self.side // self.factor) ** 2

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, side², C) -> (N, tokens, H)."""
        m, rows = self.factor, self.side // self.factor
        cut = features.unflatten(1, (rows, m, rows, m))  # (N, rows, m, columns, m, C)
        blocks = cut.transpose(2, 3).flatten(3).flatten(1, 2)  # (N, tokens, m² C)
        hidden = F.gelu(self.linear_1(self.norm(blocks)))
        projected: Tensor = self.linear_2(hidden)
        return projected

    def layers(self, images: int) -> list[Layer]:
        """The products for so many images; a norm that trains is before the first."""
        tokens = images * self.num_tokens
        linears = (self.linear_1, self.linear_2)
        return [
            Layer(tokens * each.in_features * each.out_features, behind="projector")
            for each in linears
        ]
