"""Linear layers whose frozen weights lie in four bits: NF4 of QLoRA, arXiv 2305.14314.

A weight is cut into blocks of 64 values; each is stored as one of 16 levels (quantiles of a normal
distribution) times the largest magnitude of its block, which is itself stored in 8 bits, with one
fp32 number for 256 of them: 4.127 bits a value. What bitsandbytes computes, and stock transformers
with BitsAndBytesConfig(load_in_4bit, "nf4", double quantization): the same values to the last bit.
"""

from __future__ import annotations

import importlib
from typing import Any

import torch
from torch import Tensor, nn

BLOCK, OUTER_BLOCK = 64, 256  # bitsandbytes' for NF4, and for the magnitudes of blocks
TABLE = 256  # levels of the 8-bit numbers


class NF4Linear(nn.Module):
    """A linear layer with a frozen weight (out, in) in NF4; what goes in and out has `dtype`.

    The only parameter is `packed`: two values a byte, held as if they were numbers of `dtype`, so
    that ZeRO-3 divides and gathers it like any weight, and no cast of a model touches it. The rest
    is small, and kept as bytes for the same reason. `weight` is made anew whenever it is read;
    under ZeRO-3 `packed` must be whole then.
    """

    def __init__(self, packed: Tensor, magnitudes: Tensor, scales: Tensor, linear: nn.Linear):
        super().__init__()
        self.in_features, self.out_features = linear.in_features, linear.out_features
        self.dtype = packed.dtype
        self.packed = nn.Parameter(packed, requires_grad=False)
        self.packed.num_weights = self.in_features * self.out_features  # type: ignore[attr-defined]
        self.bias = linear.bias
        self.register_buffer("magnitudes", magnitudes, persistent=False)
        self.register_buffer("scales", scales, persistent=False)

    @property
    def weight(self) -> Tensor:
        """The weight (out, in) that the four bits stand for, in `dtype`."""
        weight: Tensor = bitsandbytes().functional.dequantize_4bit(self._bytes(), self._state())
        return weight

    def forward(self, x: Tensor) -> Tensor:
        """(…, in) -> (…, out). The backward needs no weight in full precision either."""
        multiply = bitsandbytes().matmul_4bit
        product: Tensor = multiply(x, self._bytes(), self._state(), bias=self.bias)
        return product

    def _bytes(self) -> Tensor:
        count = (self.in_features * self.out_features + 1) // 2
        packed: Tensor = self.packed.detach().view(torch.uint8)
        return packed[:count, None]

    def _state(self) -> Any:
        """Bitsandbytes' own description of the bytes."""
        state_type = bitsandbytes().functional.QuantState
        scales: Any = self.scales
        numbers = scales.view(torch.float32)
        table, offset, outer = numbers[:TABLE], numbers[TABLE], numbers[TABLE + 1 :]
        return state_type(
            absmax=self.magnitudes,
            shape=torch.Size((self.out_features, self.in_features)),
            dtype=self.dtype,
            blocksize=BLOCK,
            quant_type="nf4",
            offset=offset,
            state2=state_type(absmax=outer, code=table, blocksize=OUTER_BLOCK, dtype=torch.float32),
        )


def bitsandbytes() -> Any:
    """The library, which is no requirement. Raises ValueError without it."""
    try:
        return importlib.import_module("bitsandbytes")
    except ImportError:
        raise ValueError(
            "model.lora.quantize: must have bitsandbytes beside it, got none; pip install "
            "'triptych-models[qlora]'"
        ) from None


@torch.no_grad()
def quantized(linear: nn.Linear) -> NF4Linear:
    """The layer in four bits, on the device and in the dtype of its weight, which must be whole.

    Every rank gets the same bytes. On the meta device there are only shapes.
    """
    quantize_4bit = bitsandbytes().functional.quantize_4bit
    weight = linear.weight.detach()
    dtype, device = weight.dtype, weight.device
    if device.type == "meta":
        blocks = -(-weight.numel() // BLOCK)
        magnitudes = torch.empty(blocks, dtype=torch.uint8, device=device)
        count = TABLE + 1 + -(-blocks // OUTER_BLOCK)
        scales = torch.empty(count * 4, dtype=torch.uint8, device=device)
        packed = torch.empty((weight.numel() + 1) // 2, dtype=torch.uint8, device=device)
    else:
        packed, state = quantize_4bit(
            weight, blocksize=BLOCK, compress_statistics=True, quant_type="nf4"
        )
        magnitudes, outer = state.absmax, state.state2
        numbers = [outer.code.to(device), state.offset.reshape(1), outer.absmax]
        scales = torch.cat([part.float() for part in numbers]).view(torch.uint8)
        packed = packed.flatten()
    padding = -len(packed) % dtype.itemsize
    packed = nn.functional.pad(packed, (0, padding)).view(dtype)
    return NF4Linear(packed, magnitudes, scales, linear)


def stored_weight(linear: Any) -> nn.Parameter:
    """The parameter that holds a linear layer's weight, in four bits or as it is."""
    parameter: nn.Parameter = linear.packed if isinstance(linear, NF4Linear) else linear.weight
    return parameter
