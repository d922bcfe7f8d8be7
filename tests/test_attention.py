"""Attention by hand equals PyTorch's."""

import pytest
import torch

from attention import attend



@pytest.mark.parametrize("size, known", [(256, 0), (600, 0), (1, 300), (300, 300)])
def test_attention_by_hand_is_pytorchs(size, known):
    """Fails if a block of 256 queries misses keys that it may see, or sees later ones; if the heads
    of a group get another group's keys; or if the scale or the gradients differ."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 8, requires_grad=True)
               for heads, n in ((6, size), (2, known + size), (2, known + size)))
    distance = torch.arange(known, known + size)[:, None] - torch.arange(known + size)
    mask = torch.zeros(1, 1, *distance.shape).masked_fill((distance < 0) | (distance > 400), -9e9)
    found = attend(q, k, v, mask)
    due = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    torch.testing.assert_close(found, due, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(due)
    for one, other in zip(*(torch.autograd.grad((x * weight).sum(), (q, k, v))
                            for x in (found, due)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


def test_cudnns_attention_is_off():
    """Fails if a Hopper or Blackwell GPU takes the kernel that wrong numbers are reported of."""
    assert not torch.backends.cuda.cudnn_sdp_enabled()
