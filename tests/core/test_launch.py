"""What is set before a rank computes."""

import torch

from triptych_core.launch import avoid_cudnn_attention


def test_cudnn_attention_is_off_and_the_others_are_not() -> None:
    before = torch.backends.cuda.cudnn_sdp_enabled()
    try:
        avoid_cudnn_attention()
        assert not torch.backends.cuda.cudnn_sdp_enabled()
        assert torch.backends.cuda.flash_sdp_enabled()
        assert torch.backends.cuda.mem_efficient_sdp_enabled()
    finally:
        torch.backends.cuda.enable_cudnn_sdp(before)
