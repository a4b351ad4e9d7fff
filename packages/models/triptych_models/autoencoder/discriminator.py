"""A discriminator's heads on frozen features, as StyleGAN-T's (arXiv 2301.09515) and RAE's.

On every layer's tokens: two convolutions along them, the second residual, and one to a score a
token. Weights are divided by their largest singular value (arXiv 1802.05957). Features are
normalized over the tokens of an image, where the originals take eight images together: so no score
depends on what else is in a batch, and ranks and micro-steps may share images as they like.
"""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from ..checkpointing import compile_forward

EPS = 1e-6
POWER_STEPS = 15  # of first weights, as torch's spectral_norm takes


class SpectralConv(nn.Conv1d):
    """A convolution around a ring whose matrix has the largest singular value 1, about.

    `left` and `right` follow the singular vectors by a step of power iteration in the first forward
    after `is_due` was set: once a step of training, whatever the number of micro-steps.
    """

    left: Tensor
    right: Tensor

    def __init__(self, channels: int, width: int, kernel_size: int, *, bias: bool = False) -> None:
        super().__init__(channels, width, kernel_size, bias=bias)
        self.register_buffer("left", torch.ones(width))
        self.register_buffer("right", torch.ones(channels * kernel_size))
        self.is_due = False

    def forward(self, x: Tensor) -> Tensor:
        """Tokens (N, L, C) -> (N, L, W)."""
        if self.is_due:
            self.renew()
            self.is_due = False
        matrix = self.weight.flatten(1)
        weight = self.weight / torch.dot(self.left, torch.mv(matrix, self.right))
        weight, bias = weight.to(x.dtype), None if self.bias is None else self.bias.to(x.dtype)
        reach = self.kernel_size[0] // 2
        if not reach:
            return F.linear(x, weight.squeeze(2), bias)
        # Channels stay last: so a convolution of a GPU takes them without turning them around.
        x = torch.cat([x[:, -reach:], x, x[:, :reach]], 1)
        return F.conv1d(x.transpose(1, 2), weight, bias).transpose(1, 2)

    @torch.no_grad()
    def renew(self, steps: int = 1) -> None:
        """Steps of power iteration; the weight must be whole."""
        matrix = self.weight.flatten(1)
        for _ in range(steps):
            # New tensors: a graph may still hold the old ones.
            self.left = F.normalize(matrix @ self.right, dim=0, eps=1e-12)
            self.right = F.normalize(matrix.T @ self.left, dim=0, eps=1e-12)


class TokenNorm(nn.Module):
    """Every channel with mean 0 and variance 1 over an image's tokens, scaled, shifted, leaky ReLU.

    With the residual stream it goes to, it is added to that: compiled, all is one pass.
    """

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))

    def forward(self, x: Tensor, stream: Tensor | None = None) -> Tensor:
        """(N, L, C), of any float dtype."""
        wide = x.float()
        variance, mean = torch.var_mean(wide, 1, correction=0, keepdim=True)  # (N, 1, C)
        scale = (variance + EPS).rsqrt() * self.weight
        normed = torch.addcmul(self.bias - mean * scale, wide, scale)
        found = F.leaky_relu(normed.to(x.dtype), 0.2)
        return found if stream is None else (stream + found) / 2**0.5


class Block(nn.Module):
    """A convolution, norm and leaky ReLU; before a norm a bias would do nothing."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.conv = SpectralConv(channels, channels, kernel_size)
        self.norm = TokenNorm(channels)

    def forward(self, x: Tensor, stream: Tensor | None = None) -> Tensor:
        out: Tensor = self.norm(self.conv(x), stream)
        return out


class Head(nn.Module):
    """Scores of tokens (N, L, C): (N, L)."""

    def __init__(self, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.first = Block(channels, 1)
        self.second = Block(channels, kernel_size)
        self.score = SpectralConv(channels, 1, 1, bias=True)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.first(tokens)
        x = self.second(x, x)
        out: Tensor = self.score(x)
        return out.flatten(1)


class Discriminator(nn.Module):
    """A head for each layer of features; scores above 0 say real."""

    def __init__(self, num_layers: int, channels: int, kernel_size: int) -> None:
        super().__init__()
        self.channels = channels
        self.heads = nn.ModuleList(Head(channels, kernel_size) for _ in range(num_layers))

    def forward(self, features: Sequence[Tensor]) -> Tensor:
        """Of each layer (N, L, C) -> (N, scores) fp32."""
        scores = [head(each) for head, each in zip(self.heads, features, strict=True)]
        return torch.cat(scores, 1).float()

    def convs(self) -> list[SpectralConv]:
        """All convolutions."""
        return [module for module in self.modules() if isinstance(module, SpectralConv)]

    def compile_norms(self) -> None:
        """Compile every norm in place: in fp32 its passes are dearer than the products."""
        for module in self.modules():
            if isinstance(module, TokenNorm):
                compile_forward(module)


def hinge(real: Tensor, fake: Tensor) -> Tensor:
    """(N,): what the discriminator learns by, of scores (N, K)."""
    return 0.5 * (F.relu(1 - real).mean(1) + F.relu(1 + fake).mean(1))


def deceit(fake: Tensor) -> Tensor:
    """(N,): what the decoder learns by, of scores (N, K)."""
    return F.softplus(-fake).mean(1)


def as_stored(images: Tensor) -> Tensor:
    """From 0 to 1 in 8 bits: or the discriminator would know reconstructions by finer values."""
    return (images.clamp(0, 1) * 255).round() / 255
