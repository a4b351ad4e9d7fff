"""Random JPEG quality: a pure function of the sample, the epoch and a seed."""

import hashlib

from torch import Tensor
from torchvision import io

from triptych_data.media.config import JpegConfig


def vary_jpeg(image: Tensor, config: JpegConfig, key: str, number: int, epoch: int) -> Tensor:
    """Return (3, H, W) uint8 as it is after compression by `draw_quality`, or as it was."""
    quality = draw_quality(config, key, number, epoch)
    if quality is None or max(image.shape) > 65_535:  # JPEG knows no longer side
        return image
    data = io.encode_jpeg(image.contiguous(), quality)
    return io.decode_jpeg(data, mode=io.ImageReadMode.RGB)


def draw_quality(config: JpegConfig, key: str, number: int, epoch: int) -> int | None:
    """The quality for image `number` of sample `key` in an epoch, None to leave it as it is.

    Independent of the order in which samples are read, on how many ranks and workers.
    """
    name = f"{config.seed}/{epoch}/{number}/{key}".encode("utf-8", "surrogateescape")
    digest = hashlib.blake2b(name, digest_size=16).digest()
    if int.from_bytes(digest[:8], "little") >= config.share * 2**64:
        return None
    low, high = config.quality
    return low + int.from_bytes(digest[8:], "little") % (high - low + 1)
