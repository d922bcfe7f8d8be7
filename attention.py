"""Causal attention behind one name, `attend`: PyTorch's fused kernels, or by hand where faster.

The fused kernels need no mask for plain causal attention. For a mask together with heads that share
keys PyTorch has none on a GPU: it then copies the keys for each head, and computes in float32.

Notation: B rows, T queries, S keys; H heads and K key/value heads (H / K heads share one), each of
size E.
"""

import math

import torch
import torch.nn.functional as F
from torch.utils.checkpoint import checkpoint

# On Hopper and Blackwell GPUs PyTorch prefers cuDNN's attention, which makes a plan for every new
# length. Wrong numbers are reported of it on a B200, and on an H100 where there is a mask
# (github.com/pytorch/pytorch, issues 193893 and 196678). Without it, flash attention is taken
torch.backends.cuda.enable_cudnn_sdp(False)

BLOCK = 256  # queries at a time, in attention by hand
# A longer prompt takes PyTorch's attention, which needs no mask; by hand there is one of T x T.
# (With a sliding window shorter than the prompt there is a mask anyway, and it stays by hand.)
LONGEST_PROMPT_BY_HAND = 2048
# With more keys than this, training recomputes the probabilities, which would fill most of memory
RECOMPUTED_ABOVE = 1024


def attend(q, k, v, mask):
    """softmax(q k^T / sqrt(E) + mask) v: q (B, H, T, E); k, v (B, K, S, E) -> (B, H, T, E).

    mask: what `causal_mask` gives. None means plain causal attention, T = S.
    """
    if mask is None:  # `causal_mask` has made the choice
        if not fused_kernel_shares_keys(q):
            k = k.repeat_interleave(q.shape[1] // k.shape[1], dim=1)
            v = v.repeat_interleave(q.shape[1] // v.shape[1], dim=1)
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    if mask.shape[-1] > RECOMPUTED_ABOVE:
        return recomputed(attend_by_hand, q, k, v, mask)
    return attend_by_hand(q, k, v, mask)


def fused_kernel_shares_keys(q):
    """Whether the fused kernel for q takes fewer key heads than query heads.

    On a GPU this is flash attention, which is for 16-bit numbers and for Ampere (2020) or later.
    The other fused kernel needs one key head for each query head.
    """
    if q.device.type != "cuda":
        return True
    return q.dtype != torch.float32 and torch.cuda.get_device_capability(q.device) >= (8, 0)


def causal_mask(positions, n_keys, is_prompt, window, dtype):
    """0 where a token may look and -inf elsewhere, (B or 1, 1, T, S), to be added to the scores.

    None leaves it to PyTorch's causal attention, which needs no mask. That is for prompts: on a
    CPU only for one that is too long to be done by hand.

    positions (B or 1, T) of the queries, among keys at the positions 0 to S - 1; n_keys: S;
    is_prompt: the queries are the first tokens of their rows, so that there are no earlier keys;
    window: how many tokens a token sees, itself included, or None.
    """
    if window is None:
        window = math.inf
    n_queries = positions.shape[1]
    by_hand = positions.device.type == "cpu" and n_queries <= LONGEST_PROMPT_BY_HAND
    if is_prompt and not by_hand and n_queries <= window:
        return None

    keys = torch.arange(n_keys, device=positions.device)  # (S,)
    distance = positions[:, None, :, None] - keys  # (B or 1, 1, T, S)
    unseen = (distance < 0) | (distance >= window)
    mask = torch.zeros(distance.shape, dtype=dtype, device=positions.device)
    return mask.masked_fill_(unseen, -math.inf)


def attend_by_hand(q, k, v, mask):
    """The same as PyTorch's attention with a mask, but faster (see docs/speed.md).

    The heads that share keys are rows of one product, and a block of queries meets only the keys up
    to its last query.
    """
    B, H, T, E = q.shape
    K, S = k.shape[1:3]
    q = q / E**0.5
    k = k.flatten(0, 1)  # (B K, S, E)
    v = v.flatten(0, 1)

    outputs = []
    seen = S - T  # keys before the longest row's first query; in shorter rows the mask hides some
    for queries, mask_part in zip(q.split(BLOCK, dim=2), mask.split(BLOCK, dim=2), strict=True):
        n_queries = queries.shape[2]
        seen += n_queries
        keys = k[:, :seen]
        stacked = queries.reshape(B * K, -1, E)  # (B K, H / K * n_queries, E)

        # For one new token the keys are a slice of the cache. As the right factor they would be
        # copied, so they are the left one
        if n_queries == 1:
            scores = (keys @ stacked.mT).mT
        else:
            scores = stacked @ keys.mT
        scores = scores.reshape(B, H, n_queries, seen) + mask_part[..., :seen]

        weights = scores.softmax(-1).view(B * K, -1, seen)
        output = weights @ v[:, :seen]  # (B K, H / K * n_queries, E)
        outputs.append(output.view(B, H, n_queries, E))
    return torch.cat(outputs, dim=2)


def recomputed(function, *inputs):
    """function(*inputs), computed again in the backward pass instead of kept in memory until then.

    For parts that take little time and much memory (activation checkpointing, arXiv 1604.06174).
    """
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)
