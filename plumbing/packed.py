"""Faster predictions on a CPU in bfloat16: weights laid out once, neighbours in one product.

PyTorch lays a bfloat16 weight out for oneDNN anew in every product. For a few tokens at a time that
takes longer than the product itself. `pack` does it once, and a token of text takes 0.6 of the
time. The model knows nothing of it: modules with the same names take the place of its own. The two
operators of torch.ops.mkldnn are private ones of the pinned PyTorch.
"""

import torch
from torch import nn

from clsgen import LoRALinear
from model import MLP, Attention


@torch.no_grad()
def pack(llama):
    """Puts packed projections into llama, where the processor has the instructions; returns it.

    For predictions only: the plain weights are gone, LoRA's too.
    """
    weight = llama.norm.weight
    able = torch.backends.mkldnn.is_available() and weight.device.type == "cpu"
    able = able and torch.cpu.get_capabilities().get("avx512_bf16")
    if not able or weight.dtype != torch.bfloat16:
        return llama

    for block in llama.layers:
        block.self_attn = PackedAttention(block.self_attn)
        block.mlp = PackedMLP(block.mlp)
    if llama.lm_head is None:
        llama.lm_head = PackedLinear(llama.embed_tokens)  # tied: the embedding itself stays
    else:
        llama.lm_head = PackedLinear(llama.lm_head)
    return llama


def is_packed(llama):
    return isinstance(llama.lm_head, PackedLinear)


class PackedAttention(Attention):
    """Attention whose q, k and v are one product."""

    def __init__(self, attention):
        nn.Module.__init__(self)
        self.head_dim = attention.head_dim
        self.has_rope = attention.has_rope
        self.query_scale = attention.query_scale
        self.q_norm = attention.q_norm
        self.k_norm = attention.k_norm
        self.packed_qkv = PackedLinears(attention.q_proj, attention.k_proj, attention.v_proj)
        self.o_proj = PackedLinear(attention.o_proj)

    def qkv(self, x):
        return self.packed_qkv(x)


class PackedMLP(MLP):
    """An MLP whose gate and up are one product."""

    def __init__(self, mlp):
        nn.Module.__init__(self)
        self.activation = mlp.activation
        self.packed_gate_up = PackedLinears(mlp.gate_proj, mlp.up_proj)
        self.down_proj = PackedLinear(mlp.down_proj)

    def gate_up(self, x):
        return self.packed_gate_up(x)


class PackedLinears(nn.Module):
    """Several linear layers that read the same input, with their LoRA, computed in two products.

        [y1 | y2 | a1 | a2] = x [W1; W2; A1; A2]^T + b,   then   [y1 | y2] += [a1 | a2] B^T

    The blocks of B are B1 and B2.
    """

    def __init__(self, *layers):
        super().__init__()
        self.lora_on = True  # see clsgen.base_model

        weights, downs, ups, biases = [], [], [], []
        for layer in layers:
            if isinstance(layer, LoRALinear):
                downs.append(layer.scale * layer.lora_A.weight)
                ups.append(layer.lora_B.weight)
                layer = layer.base
            else:
                downs.append(layer.weight[:0])  # rank 0
                ups.append(layer.weight[:, :0])
            weights.append(layer.weight)
            biases.append(getattr(layer, "bias", None))

        dtype = weights[0].dtype
        self.rank = sum(len(down) for down in downs)
        self.sizes = [len(weight) for weight in weights] + [self.rank]
        self.down = lay_out(torch.cat(weights + [down.to(dtype) for down in downs]))
        self.up = None
        if self.rank:
            self.up = lay_out(torch.block_diag(*ups).to(dtype))
        self.bias = None
        if biases[0] is not None:
            self.bias = torch.cat([*biases, biases[0].new_zeros(self.rank)])

    def forward(self, x):
        if torch.is_grad_enabled():
            raise ValueError("this model is packed for predictions and cannot be trained: load it "
                             "with pack=False, or predict inside torch.inference_mode()")
        y = self.down(x, self.bias)
        *parts, low_rank = y.split(self.sizes, dim=-1)
        if self.rank and self.lora_on:
            y[..., : -self.rank].add_(self.up(low_rank))  # the parts are views of it
        return parts


class PackedLinear(PackedLinears):
    """The same for a single projection: it returns a tensor, not a list."""

    def forward(self, x):
        (y,) = super().forward(x)
        return y


def lay_out(weight):
    """A function of x and a bias, x W^T + b, whose W is laid out as oneDNN multiplies it."""
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight)

    def linear(x, bias=None):
        return torch.ops.mkldnn._linear_pointwise(x, laid_out, bias, "none", [], "")

    return linear
