"""A projector with a fixed number of tokens an image: learned queries look at all features.

One layer of cross-attention with two-dimensional positions added to queries and keys, as in Qwen-VL
(arXiv 2308.12966, section 2.1) and MiniCPM-V (arXiv 2408.01800); learned queries are of Flamingo's
perceiver resampler (arXiv 2204.14198). For features x (P, C) of an image, queries Q (n, H):

    k = norm(x W_in)    q = norm(Q)    a = attention((q + pos_n) W_q, (k + pos_P) W_k, k W_v) W_o
    tokens = norm(a) W_out

pos are sines and cosines of rows in the first half of H, of columns in the second, with wavelengths
of 2 pi to 20,000 pi in units of the features' grid; the queries are spread evenly over that grid.
"""

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .flops import Layer

EPS = 1e-6


class Resampler(nn.Module):
    """Features (N, side², C) of N images to (N, num_queries, H), num_queries a square."""

    def __init__(
        self, width: int, hidden_size: int, side: int, num_queries: int, num_heads: int
    ) -> None:
        super().__init__()
        self.side, self.num_tokens, self.num_heads = side, num_queries, num_heads
        self.query = nn.Parameter(torch.empty(num_queries, hidden_size))
        self.kv_proj = nn.Linear(width, hidden_size, bias=False)
        self.query_norm = nn.LayerNorm(hidden_size, EPS)
        self.kv_norm = nn.LayerNorm(hidden_size, EPS)
        self.q_proj, self.k_proj, self.v_proj, self.o_proj = (
            nn.Linear(hidden_size, hidden_size) for _ in range(4)
        )
        self.post_norm = nn.LayerNorm(hidden_size, EPS)
        self.out_proj = nn.Linear(hidden_size, hidden_size, bias=False)
        nn.init.normal_(self.query, std=0.02)

    @staticmethod
    def check(hidden_size: int, side: int, num_queries: int, num_heads: int) -> None:
        """Raise ValueError for a resampler that cannot be."""
        is_count = isinstance(num_queries, int) and num_queries > 0
        for name, value, holds, wanted in (
            ("num_queries", num_queries, is_count and _is_square(num_queries), "a square"),
            (
                "num_heads",
                num_heads,
                isinstance(num_heads, int) and num_heads > 0 and hidden_size % num_heads == 0,
                f"a divisor of {hidden_size}",
            ),
        ):
            if not holds:
                raise ValueError(
                    f"model.path: config.json's projector.{name} must be {wanted}, got {value}; "
                    "choose another"
                )
        if hidden_size % 4:
            raise ValueError(
                "model.path: config.json's text_config.hidden_size must be a multiple of 4 for "
                f"a resampler, got {hidden_size}; take another projector"
            )

    def layers(self, images: int) -> list[Layer]:
        """The products for so many images; the queries' own comes once for all of them."""
        hidden, width = self.kv_proj.out_features, self.kv_proj.in_features
        patches, tokens = images * self.side**2, images * self.num_tokens
        return [
            Layer(patches * width * hidden, behind="tower"),
            Layer((self.num_tokens if images else 0) * hidden**2, behind="queries"),
            Layer(
                2 * patches * hidden**2,
                behind="projector",
                attention=2 * tokens * self.side**2 * hidden,
            ),
            Layer(2 * tokens * hidden**2, behind="projector"),
        ]

    def forward(self, features: Tensor) -> Tensor:
        """Features (N, side², C) -> (N, num_queries, H)."""
        keys = self.kv_norm(self.kv_proj(features))  # (N, P, H)
        at_queries, at_keys = (
            grid_positions(n, self.side, keys) for n in (self.num_tokens, self.side**2)
        )
        queries = self.q_proj(self.query_norm(self.query) + at_queries)  # (n, H), of all images
        queries = queries.expand(len(keys), -1, -1)
        heads = [
            x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2)  # (N, heads, n or P, head_dim)
            for x in (queries, self.k_proj(keys + at_keys), self.v_proj(keys))
        ]
        attended = F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)
        projected: Tensor = self.out_proj(self.post_norm(self.o_proj(attended)))
        return projected


def _is_square(number: int) -> bool:
    return math.isqrt(number) ** 2 == number


def grid_positions(count: int, side: int, like: Tensor) -> Tensor:
    """Sines and cosines (count, H) of the places of a square of points spread over side x side.

    Computed in fp32, then of the dtype of `like` (…, H).
    """
    points, quarter = math.isqrt(count), like.shape[-1] // 4
    # The middles of `points` equal parts: of the features themselves 0, 1, 2 …
    at = (torch.arange(points, device=like.device) + 0.5) * (side / points) - 0.5
    rates = 10_000.0 ** (-torch.arange(quarter, device=like.device) / quarter)
    angles = at[:, None] * rates  # (points, H / 4)
    along = torch.cat([angles.sin(), angles.cos()], dim=1)  # (points, H / 2)
    rows = along[:, None].expand(-1, points, -1)
    columns = along[None].expand(points, -1, -1)
    return torch.cat([rows, columns], dim=-1).flatten(0, 1).to(like.dtype)
