"""A Llama-style transformer in plain PyTorch, with the module names of Hugging Face's checkpoints.

Each block adds attention and then a gated MLP to its input, each after an RMSNorm. Positions enter
as rotations of queries and keys. Reference: github.com/huggingface/transformers,
src/transformers/models/llama/modeling_llama.py. Papers: Llama, arXiv 2302.13971 and 2407.21783.

recomputed(f, x) is f(x). In training the backward pass computes it once more, so that the large
tensors inside f need not be kept until then.

Notation: B rows, T tokens of this call, S keys (those in the cache too), C tokens that a cache has
room for, D hidden size, V vocabulary; H heads and K key/value heads, each of size E; c is the
LlamaConfig.
"""

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import nn

from attention import attend, causal_mask, recomputed


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the mean in float32 (arXiv 1910.07467)."""

    def __init__(self, c, size):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = c.rms_norm_eps

    def forward(self, x):
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


class Attention(nn.Module):
    """Causal attention in which H / K heads share a key/value head (arXiv 2305.13245)."""

    def __init__(self, c, layer):
        super().__init__()
        self.head_dim = c.head_dim
        self.has_rope = layer not in c.layers_without_rope
        self.query_scale = c.query_scale
        q_size = c.num_attention_heads * c.head_dim
        kv_size = c.num_key_value_heads * c.head_dim
        self.q_proj = nn.Linear(c.hidden_size, q_size, bias=c.qkv_bias)
        self.k_proj = nn.Linear(c.hidden_size, kv_size, bias=c.qkv_bias)
        self.v_proj = nn.Linear(c.hidden_size, kv_size, bias=c.qkv_bias)
        self.o_proj = nn.Linear(q_size, c.hidden_size, bias=c.o_bias)

        self.q_norm = None
        self.k_norm = None
        if c.qk_norm:
            self.q_norm = RMSNorm(c, c.head_dim)
            self.k_norm = RMSNorm(c, c.head_dim)

    def qkv(self, x):  # a method of its own: plumbing/packed.py makes it one matrix product
        return self.q_proj(x), self.k_proj(x), self.v_proj(x)

    def forward(self, x, rope, mask, cache=None, places=None):
        """x (B, T, D) -> (B, T, D).

        rope: what `rope_cos_sin` returns; mask: see attention.py. cache: this layer's keys and
        values, (2, B, K, C, E). places: where in the cache the keys and values of this call go, as
        rows (B, 1) and positions (B or 1, T).
        """
        B, T, _ = x.shape
        q, k, v = (part.view(B, T, -1, self.head_dim) for part in self.qkv(x))
        if self.q_norm is not None:
            q = self.q_norm(q)
            k = self.k_norm(k)

        q = q.transpose(1, 2)  # (B, H, T, E)
        k = k.transpose(1, 2)  # (B, K, T, E)
        v = v.transpose(1, 2)
        if self.has_rope:
            q = rotate(q, *rope)
            k = rotate(k, *rope)
        if self.query_scale != 1.0:
            q = q * self.query_scale

        if cache is not None:
            rows, positions = places
            keys, values = cache
            keys[rows, :, positions] = k.transpose(1, 2)  # (B, T, K, E): the indices' axes first
            values[rows, :, positions] = v.transpose(1, 2)
            if mask is not None:  # without a mask these are whole prompts: k, v have every key
                k, v = cache[:, :, :, : mask.shape[-1]]

        y = attend(q, k, v, mask)  # (B, H, T, E)
        return self.o_proj(y.transpose(1, 2).flatten(2))


class MLP(nn.Module):
    """down(activation(gate(x)) * up(x)). With silu this is SwiGLU (arXiv 2002.05202)."""

    def __init__(self, c):
        super().__init__()
        self.activation = ACTIVATIONS[c.activation]  # a table at the end of this file
        self.gate_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.up_proj = nn.Linear(c.hidden_size, c.intermediate_size, bias=False)
        self.down_proj = nn.Linear(c.intermediate_size, c.hidden_size, bias=False)

    def gate_up(self, x):  # a method of its own: plumbing/packed.py makes it one matrix product
        return self.gate_proj(x), self.up_proj(x)

    def gated(self, gate, up):
        return self.activation(gate) * up

    def forward(self, x):
        gate, up = self.gate_up(x)  # (B, T, intermediate size) each
        return self.down_proj(recomputed(self.gated, gate, up))


class Block(nn.Module):
    """Attention and MLP, each added to its input: x + multiplier * f(norm(x)).

    The multiplier is 1 in all models but Granite.
    """

    def __init__(self, c, layer):
        super().__init__()
        self.multiplier = c.residual_multiplier
        self.input_layernorm = RMSNorm(c, c.hidden_size)
        self.self_attn = Attention(c, layer)
        self.post_attention_layernorm = RMSNorm(c, c.hidden_size)
        self.mlp = MLP(c)

    def forward(self, x, rope, mask, cache=None, places=None):
        normed = recomputed(self.input_layernorm, x)
        x = torch.add(x, self.self_attn(normed, rope, mask, cache, places), alpha=self.multiplier)
        normed = recomputed(self.post_attention_layernorm, x)
        return torch.add(x, self.mlp(normed), alpha=self.multiplier)


class Llama(nn.Module):
    """The decoder: token ids to hidden states, and hidden states to logits over the vocabulary."""

    def __init__(self, config):
        super().__init__()
        self.config = config
        self.checkpointing = False  # True: whole blocks are recomputed, for less memory still
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(
            Block(config, layer) for layer in range(config.num_hidden_layers))
        self.norm = RMSNorm(config, config.hidden_size)
        self.lm_head = None  # then the embedding matrix takes its place, see `logits`
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids, cache=None, positions=None):
        """input_ids (B, T) -> hidden states after the final norm, (B, T, D).

        Rows are padded on the right, so that the causal mask alone keeps a token from seeing pads.
        With a cache of `new_cache`, the first call takes the prompts, without positions. Each later
        call takes tokens that follow, with their positions (B, T), and reads every place of the
        cache that it is given. To save time, give it only the first n places, cache[..., :n, :];
        all positions must then be below n.
        """
        x = self.embed_tokens(input_ids) * self.config.embedding_multiplier  # (B, T, D)
        B, T, _ = x.shape
        is_prompt = positions is None
        if is_prompt:
            positions = torch.arange(T, device=x.device)[None]  # (1, T)
            n_keys = T
        else:
            n_keys = cache.shape[-2]

        rope = rope_cos_sin(self.config, positions, x.dtype)
        mask = causal_mask(positions, n_keys, is_prompt, self.config.sliding_window, x.dtype)

        places = (torch.arange(B, device=x.device)[:, None], positions)
        for layer, block in enumerate(self.layers):
            if cache is not None:
                x = block(x, rope, mask, cache[layer], places)
            elif self.checkpointing:
                x = recomputed(block, x, rope, mask)
            else:
                x = block(x, rope, mask)
        return self.norm(x)

    def logits(self, hidden):
        """Hidden states (..., D) -> logits over the vocabulary (..., V)."""
        hidden = hidden / self.config.logits_scaling
        if self.lm_head is None:
            return F.linear(hidden, self.embed_tokens.weight)
        return self.lm_head(hidden)

    def output_rows(self, token_ids):
        """Rows (n, D) in float32, whose products with a hidden state are these tokens' logits."""
        weight = self.embed_tokens.weight
        if self.lm_head is not None:
            weight = self.lm_head.weight
        return weight[token_ids].float() / self.config.logits_scaling

    def new_cache(self, n_rows, n_tokens):
        """Room for the keys and values of C = n_tokens tokens a row, (layers, 2, B, K, C, E).

        Prompts are padded on the right: a row's first new token overwrites its first pad.
        """
        c = self.config
        shape = (c.num_hidden_layers, 2, n_rows, c.num_key_value_heads, n_tokens, c.head_dim)
        return self.norm.weight.new_zeros(shape)


# --- rotary positions (arXiv 2104.09864) ----------------------------------------------------------
def rotate(x, cos, signed_sin):
    """Turns each pair of numbers in x by the angle of its position; x (B, heads, T, E).

        x = [ a_0 a_1 ... | b_0 b_1 ... ]  ->  [ a cos - b sin | b cos + a sin ]

    Pair i is (a_i, b_i), as in Hugging Face's checkpoints; the paper pairs neighbours. The two
    factors are those of `rope_cos_sin`.
    """
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # [ b | a ]
    return torch.addcmul(x * cos, swapped, signed_sin)  # x * cos + swapped * signed_sin


def rope_cos_sin(config, positions, dtype):
    """[cos | cos] and [-sin | sin] at positions (B or 1, T), each (B or 1, 1, T, E)."""
    frequencies, amplitude = rope_frequencies(config, positions.device)
    angles = positions[:, None, :, None] * frequencies  # (B or 1, 1, T, E/2), float32
    cos = amplitude * angles.cos()
    sin = amplitude * angles.sin()
    signed_sin = torch.cat((-sin, sin), dim=-1)
    return torch.cat((cos, cos), dim=-1).to(dtype), signed_sin.to(dtype)


def rope_frequencies(config, device=None):
    """(the angle that each of the E/2 pairs turns by from one position to the next, amplitude).

    The angles are float32. The amplitude, by which cos and sin are multiplied, is 1 but for YaRN.
    """
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    frequencies = 1.0 / config.rope_theta**exponents
    return ROPE_SCALINGS[config.rope_type](frequencies, config)


# Each of these functions is the one of the same name in transformers' modeling_rope_utils.py
def default_rope(frequencies, config):
    return frequencies, 1.0


def linear_rope(frequencies, config):
    """Position interpolation (arXiv 2306.15595): `factor` times as many positions, all closer."""
    return frequencies / config.rope_scaling["factor"], 1.0


def llama3_rope(frequencies, config):
    """Llama 3.1: slows long waves down by `factor`, keeps short ones, and blends in between."""
    scaling = config.rope_scaling
    low = scaling["low_freq_factor"]
    high = scaling["high_freq_factor"]
    # how often each pair turns around within the length of the original training
    turns = scaling["original_max_position_embeddings"] * frequencies / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * frequencies + (1 - keep) * frequencies / scaling["factor"], 1.0


def yarn_rope(frequencies, config):
    """YaRN (arXiv 2309.00071): as llama3_rope, but the blend is linear in the number of the pair.

    A larger amplitude makes attention sharper, which long texts need.
    """
    scaling = config.rope_scaling

    def pair_that_turns(times):
        """The index, not rounded, of the pair that turns around so often in the original length."""
        wavelength = scaling["original_max_position_embeddings"] / times
        return len(frequencies) * math.log(wavelength / (2 * math.pi)) / math.log(config.rope_theta)

    first = max(math.floor(pair_that_turns(scaling["beta_fast"])), 0)
    last = min(math.ceil(pair_that_turns(scaling["beta_slow"])), config.head_dim - 1)
    if first == last:
        last += 0.001
    pairs = torch.arange(len(frequencies), device=frequencies.device)
    slow = ((pairs - first) / (last - first)).clamp(0, 1)
    blended = slow * frequencies / scaling["factor"] + (1 - slow) * frequencies
    return blended, scaling["attention_factor"]


# --- what differs between models ------------------------------------------------------------------
ACTIVATIONS = {"silu": F.silu}
ROPE_SCALINGS = {
    "default": default_rope,
    "dynamic": default_rope,  # within max_position_embeddings it changes nothing
    "linear": linear_rope,
    "llama3": llama3_rope,
    "yarn": yarn_rope,
}


@dataclass
class LlamaConfig:
    """The sizes and variants of one model, most of them under config.json's names."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int  # positions that it can read
    rms_norm_eps: float
    rope_theta: float = 10000.0
    rope_type: str = "default"
    rope_scaling: dict | None = None  # the numbers that rope_type needs
    tie_word_embeddings: bool = False
    activation: str = "silu"
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False  # an RMSNorm on each head's queries and keys
    sliding_window: int | None = None  # how many tokens a token sees, itself included; None: all
    layers_without_rope: tuple = ()  # numbers of layers, from 0, that do not rotate q and k
    query_scale: float = 1.0  # of attention scores, on top of 1 / sqrt(E)
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    logits_scaling: float = 1.0  # logits are divided by it


# How each model_type of config.json differs from the defaults above. STATED: config.json must have
# the value, which `read_config` (plumbing/checkpoint.py) reads. rope_theta and tie_word_embeddings
# are for a config.json that leaves them out; the biases are so whatever its attention_bias says
STATED = "stated in config.json"
FAMILIES = {
    "llama": {},
    "mistral": {"sliding_window": STATED},  # arXiv 2310.06825
    "qwen2": {"qkv_bias": True, "o_bias": False},  # arXiv 2407.10671
    "qwen3": {"qk_norm": True},  # arXiv 2505.09388
    "seed_oss": {"qkv_bias": True, "o_bias": False},
    "smollm3": {  # arXiv 2501.18795 found layers without rope
        "layers_without_rope": STATED,
        "rope_theta": 2000000.0,
        "tie_word_embeddings": True,
    },
    "granite": {  # IBM's Granite 3, with the scales of muP, arXiv 2203.03466
        "query_scale": STATED,
        "embedding_multiplier": STATED,
        "residual_multiplier": STATED,
        "logits_scaling": STATED,
    },
    "internlm3": {},
    "iquestcoder": {},
}
