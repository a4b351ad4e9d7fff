"""SiT and its losses as straight formulas, one image at a time."""

import math

import torch
from torch import Tensor

from triptych_models.diffusion.config import SiTConfig


def predict(w: dict[str, Tensor], config: SiTConfig, x: Tensor, t: Tensor, label: Tensor) -> Tensor:
    """x (C, S, S), t and label (): the first C channels of what the net gives."""
    patch, side, width = (
        config.patch_size,
        config.image_size // config.patch_size,
        w["pos"].shape[1],
    )
    kernel = w["x_embedder.proj.weight"].flatten(1)
    tokens = []
    for row in range(side):
        for column in range(side):
            corner = (row * patch, column * patch)
            window = x[:, corner[0] : corner[0] + patch, corner[1] : corner[1] + patch]
            tokens.append(kernel @ window.flatten() + w["x_embedder.proj.bias"])
    h = torch.stack(tokens) + w["pos"]
    k = torch.arange(128, dtype=x.dtype)
    angles = t * 10000 ** (-k / 128)
    waves = torch.cat([torch.cos(angles), torch.sin(angles)])
    hidden = _silu(w["t_embedder.mlp.0.weight"] @ waves + w["t_embedder.mlp.0.bias"])
    c = w["t_embedder.mlp.2.weight"] @ hidden + w["t_embedder.mlp.2.bias"]
    c = c + w["y_embedder.embedding_table.weight"][label]
    for i in range(config.num_layers):
        h = _block(w, f"blocks.{i}.", h, c, config.num_heads)
    shift, scale = _modulation(w, "final_layer.", c, width)
    h = _norm(h) * (1 + scale) + shift
    out = h @ w["final_layer.linear.weight"].T + w["final_layer.linear.bias"]
    image = torch.zeros(config.out_channels, config.image_size, config.image_size, dtype=x.dtype)
    pieces = out.view(side, side, patch, patch, config.out_channels)
    rows = []
    for row in range(side):
        line = [pieces[row, column].permute(2, 0, 1) for column in range(side)]
        rows.append(torch.cat(line, dim=2))
    image = torch.cat(rows, dim=1)
    return image[: config.channels]


def _block(w: dict[str, Tensor], name: str, h: Tensor, c: Tensor, num_heads: int) -> Tensor:
    width = h.shape[1]
    shift, scale, gate, shift2, scale2, gate2 = _modulation(w, name, c, width)
    qkv = _linear(w, name + "attn.qkv", _norm(h) * (1 + scale) + shift)
    q, k, v = qkv[:, :width], qkv[:, width : 2 * width], qkv[:, 2 * width :]
    dim, heads = width // num_heads, []
    for head in range(num_heads):
        mine = slice(head * dim, (head + 1) * dim)
        scores = q[:, mine] @ k[:, mine].T / math.sqrt(dim)
        heads.append(torch.softmax(scores, dim=1) @ v[:, mine])
    h = h + gate * _linear(w, name + "attn.proj", torch.cat(heads, dim=1))
    inner = _linear(w, name + "mlp.fc1", _norm(h) * (1 + scale2) + shift2)
    inner = 0.5 * inner * (1 + torch.tanh(math.sqrt(2 / math.pi) * (inner + 0.044715 * inner**3)))
    return h + gate2 * _linear(w, name + "mlp.fc2", inner)


def _linear(w: dict[str, Tensor], name: str, h: Tensor) -> Tensor:
    return h @ w[name + ".weight"].T + w[name + ".bias"]


def _modulation(w: dict[str, Tensor], name: str, c: Tensor, width: int) -> tuple[Tensor, ...]:
    name += "adaLN_modulation.1"
    return (w[name + ".weight"] @ _silu(c) + w[name + ".bias"]).split(width)


def _norm(h: Tensor) -> Tensor:
    mean = h.mean(1, keepdim=True)
    return (h - mean) / torch.sqrt(((h - mean) ** 2).mean(1, keepdim=True) + 1e-6)


def _silu(x: Tensor) -> Tensor:
    return x / (1 + torch.exp(-x))


def path(name: str, t: Tensor) -> tuple[Tensor, Tensor]:
    """alpha and sigma at t."""
    if name == "linear":
        return t, 1 - t
    if name == "gvp":
        return torch.sin(math.pi * t / 2), torch.cos(math.pi * t / 2)
    alpha = torch.exp(-0.25 * (1 - t) ** 2 * 19.9 - 0.5 * (1 - t) * 0.1)
    return alpha, torch.sqrt(1 - alpha**2)


def loss(
    net: torch.nn.Module,
    objective: tuple[str, str, str],
    batch: dict[str, Tensor],
    drop_below: float,
) -> Tensor:
    """Summed over a batch; the velocity and its weights by derivatives that autograd takes."""
    name, prediction, weighting = objective
    config = net.config
    w = dict(net.named_parameters()) | {"pos": net.pos_embed[0]}
    low, high = (
        (0.0, 1 - 1e-5)
        if name == "vp"
        else (0.0, 1.0)
        if prediction == "velocity"
        else (
            1e-3,
            1 - 1e-3,
        )
    )
    total = torch.zeros((), dtype=torch.float64)
    for i, weight in enumerate(batch["weights"]):
        data, noise, t = batch["latents"][i], batch["noise"][i], batch["times"][i]
        t = (low + (high - low) * t).detach().requires_grad_()
        alpha, sigma = path(name, t)
        (da,) = torch.autograd.grad(alpha, t, retain_graph=True)
        (ds,) = torch.autograd.grad(sigma, t)
        alpha, sigma, t = alpha.detach(), sigma.detach(), t.detach()
        label = batch["labels"][i] if batch["drops"][i] >= drop_below else config.num_classes
        out = predict(w, config, alpha * data + sigma * noise, t, label)
        if prediction == "velocity":
            error = out - (da * data + ds * noise)
        else:
            error = out - noise if prediction == "noise" else sigma * out + noise
        factor = 1.0
        lam = sigma**2 * da / alpha - sigma * ds  # half of the reverse SDE's diffusion
        if weighting == "velocity":
            factor = (lam / sigma) ** 2
        elif weighting == "likelihood":
            factor = lam / sigma**2
        total = total + weight * (factor * error**2).sum()
    return total
