"""A Llama-style transformer in plain PyTorch, loaded from a Hugging Face folder.

    llama = load_llama("models/smollm2-135m")     # config.json, *.safetensors
    logits = llama.logits(llama(input_ids))        # (B, T) -> (B, T, D) -> (B, T, V)

Llama (arXiv 2302.13971, 2407.21783): RMSNorm before each block, rotary positions, grouped-query
attention, SwiGLU. Mistral (2310.06825) adds a sliding window, Qwen2 biases on q, k and v, Qwen3 a
norm on each head's q and k: fields of one config. Module names are the checkpoint's names.
Reference: github.com/huggingface/transformers, src/transformers/models/llama/modeling_llama.py

Notation: B rows, T tokens of this call, S keys (those in the cache too), D hidden size, V
vocabulary; H heads and K key/value heads, each of size E.
"""

import json
import math
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from safetensors import SafetensorError, safe_open
from torch import nn
from torch.utils.checkpoint import checkpoint

# --- configuration --------------------------------------------------------------------------------
FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
# Keys that would change the computation, with the one value of each that we compute
FIXED = {"hidden_act": "silu", "mlp_bias": False, "attention_dropout": 0.0,
         "rope_interleaved": False, "partial_rotary_factor": 1.0, "quantization_config": None}
KNOWN = set(  # used below, or of no effect here
    "model_type tie_word_embeddings attention_bias sliding_window use_sliding_window layer_types"
    " rms_norm_eps rope_theta rope_scaling rope_parameters architectures _name_or_path dtype"
    " torch_dtype transformers_version use_cache bos_token_id eos_token_id pad_token_id"
    " initializer_range pretraining_tp max_window_layers is_llama_config transformers.js_config"
    " id2label label2id".split()
)
LLAMA3_ROPE = ("factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")


@dataclass
class LlamaConfig:
    """The architecture, under config.json's names. sliding_window None: attention sees all."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    num_attention_heads: int
    num_key_value_heads: int
    head_dim: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float = 10000.0
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None

    @classmethod
    def from_dict(cls, raw, name="config.json"):
        """A config.json's content -> LlamaConfig. Every key is used, known to change nothing, or
        refused by name (ValueError); an unknown one gives a warning line."""
        def support(fits, key, value, due):
            if not fits:
                raise ValueError(f"{name}: {key} is {value!r}; supported is {due}")

        def number(key, where=raw, kinds=(int, float)):
            value, due, limit = where.get(key), "a number above 0", math.inf
            if kinds == (int,):  # below the limit, no product of sizes overflows
                due, limit = "1, 2, ... below 2^24", 2**24
            support(type(value) in kinds and 0 < value < limit, key, value, due)
            return value

        family = raw.get("model_type")
        support(family in FAMILIES, "model_type", family, ", ".join(FAMILIES))
        for key, value in FIXED.items():
            support(raw.get(key, value) == value, key, raw.get(key), repr(value))
        # Old Llama configs leave these two out; Qwen3's head_dim is no such ratio
        sizes = {"num_key_value_heads": raw.get("num_attention_heads"), **raw}
        if raw.get("head_dim") is None and family != "qwen3":
            sizes["head_dim"] = number("hidden_size") // number("num_attention_heads")
        names = [key for key, kind in cls.__annotations__.items() if kind is int]
        sizes = {key: number(key, sizes, (int,)) for key in names}
        heads, kv_heads = sizes["num_attention_heads"], sizes["num_key_value_heads"]
        support(heads % kv_heads == 0, "num_key_value_heads", kv_heads, f"a divisor of {heads}")
        head_dim = sizes["head_dim"]
        support(head_dim % 2 == 0 and heads * head_dim < 2**24, "head_dim", head_dim,
                f"an even number below 2^24 / {heads}")
        # Rotary positions: `rope_theta` and `rope_scaling`, or transformers 5's `rope_parameters`
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        support(isinstance(rope, dict), "rope_scaling", rope, "an object or null")
        kind = rope.get("rope_type", rope.get("type", "default"))
        support(kind in ("default", "llama3"), "rope_type", kind, "default, llama3")
        llama3 = {key: number(key, rope) for key in LLAMA3_ROPE} if kind == "llama3" else None
        # Mistral's window is on all layers; Qwen2 stores one that it does not use
        mistral, layers = family == "mistral", set(map(str, [*(raw.get("layer_types") or ())]))
        same = layers <= {("full", "sliding")[mistral] + "_attention"}
        support(same and not raw.get("use_sliding_window"), "layer_types", sorted(layers),
                "full attention, or mistral's sliding_window")
        support(not mistral or "sliding_window" in raw,  # transformers would take 4096 here
                "sliding_window", "absent", "a number or null")
        windowed = mistral and raw["sliding_window"] is not None
        if unknown := sorted(raw.keys() - KNOWN - FIXED.keys() - set(names)):
            print(f"warning: {name}: unknown keys: {unknown}", file=sys.stderr)
        bias = bool(raw.get("attention_bias"))
        return cls(
            **sizes, rms_norm_eps=number("rms_norm_eps"), rope_scaling=llama3,
            rope_theta=number("rope_theta", {"rope_theta": 10000.0, **raw, **rope}),
            tie_word_embeddings=bool(raw.get("tie_word_embeddings")), qk_norm=family == "qwen3",
            qkv_bias=bias or family == "qwen2", o_bias=bias and family != "qwen2",
            sliding_window=number("sliding_window", kinds=(int,)) if windowed else None)


# --- the layers -----------------------------------------------------------------------------------
class Linear(nn.Linear):
    """x W^T + b without initial values: the checkpoint has them, and drawing them takes seconds."""
    packed, off = None, False  # a `Packed` of this and its neighbours; True: without low_rank

    def reset_parameters(self):
        pass

    def low_rank(self):
        """(A, B) of B A, which is added to W unless `off`: empty here, LoRA's in clsgen.py."""
        return self.weight[:0], self.weight[:, :0]

    def forward(self, x):
        return F.linear(x, self.weight.to(x.dtype), self.bias)  # LoRA's weights are float32


def lay_out(weight):
    """A function of x and a bias, x W^T + b: W as oneDNN multiplies it on a CPU, laid out once,
    where F.linear does that in each call."""
    laid_out = torch.ops.mkldnn._reorder_linear_weight(weight)
    return lambda x, bias=None: torch.ops.mkldnn._linear_pointwise(
        x, laid_out, bias, "none", [], "")


class Packed:
    """Projections of one input, for predictions, LoRA's included:

        [y1 | y2 | a1 | a2] = x [W1; W2; A1; A2]^T + b,   then   [y1 | y2] += [a1 | a2] B^T
    with B1 and B2 as the blocks of B: two products, however many layers. Takes their weights."""

    def __init__(self, *layers):
        downs, ups = zip(*(layer.low_rank() for layer in layers), strict=True)
        rank, first = sum(map(len, downs)), layers[0]
        dtype, self.kinds = first.weight.dtype, {type(layer) for layer in layers}
        self.sizes = [*(layer.out_features for layer in layers), rank]
        self.down = lay_out(torch.cat(
            [*(layer.weight for layer in layers), *(a.to(dtype) for a in downs)]))
        self.up = lay_out(torch.block_diag(*ups).to(dtype)) if rank else None
        self.bias = None if first.bias is None else torch.cat(
            [*(layer.bias for layer in layers), first.bias.new_zeros(rank)])
        for module in (module for layer in layers for module in layer.modules()):
            module.weight = None

    def __call__(self, x):
        both = self.down(x, self.bias)
        *parts, low = both.split(self.sizes, dim=-1)
        if self.up and not any(kind.off for kind in self.kinds):
            both[..., : -low.shape[-1]].add_(self.up(low))  # the parts are views of it
        return parts


def project(x, *layers):
    """[layer(x) for layer in layers]; after Llama.pack the first of a group does it for all."""
    packed = layers[0].packed
    return [layer(x) for layer in layers] if packed is None else packed(x)


def recomputed(function, *inputs):
    """function(*inputs); the backward pass computes it again from its inputs instead of keeping
    what lies between. For parts that are cheap beside the memory that they would take."""
    if not torch.is_grad_enabled():
        return function(*inputs)
    return checkpoint(function, *inputs, use_reentrant=False, preserve_rng_state=False)


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the mean in float32 (arXiv 1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight, self.eps = nn.Parameter(torch.ones(size)), eps

    def forward(self, x):
        wide = x.float()
        scale = torch.rsqrt(wide.square().mean(-1, keepdim=True) + self.eps)
        return self.weight * (wide * scale).to(x.dtype)


def rope_frequencies(config, device=None):
    """The E/2 angles per position, float32 (arXiv 2104.09864), stretched as `rope_scaling` says."""
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    freq = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    # Llama 3.1 slows long waves down by `factor`, keeps short ones, and blends between the two
    # (transformers, modeling_rope_utils.py, _compute_llama3_parameters)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * freq + (1 - keep) * freq / scaling["factor"]


def rotate(x, cos, sin):
    """Rotary positions in the split-halves layout of Hugging Face's checkpoints.

        x = [ a_0 a_1 ... | b_0 b_1 ... ]  ->  [ a cos - b sin | b cos + a sin ]
    Pair i is (a_i, b_i), not neighbours as in the papers: that gives twenty fluent tokens, then
    nonsense. x (B, heads, T, E); cos = [cos | cos], sin = [-sin | sin] (B or 1, 1, T, E)."""
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # [ b | a ]
    return torch.addcmul(x * cos, swapped, sin)


def attend(q, k, v, mask):
    """softmax(q k^T / sqrt(E) + mask) v: q (B, H, T, E); k, v (B, K, S, E); None: causal, T = S."""
    if mask is None or q.device.type != "cpu":
        return F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=True)
    long = mask.shape[-1] > 1024  # the probabilities, T x T, would be most of the memory
    return recomputed(attend_by_hand, q, k, v, mask) if long else attend_by_hand(q, k, v, mask)


def attend_by_hand(q, k, v, mask):
    """Faster than PyTorch's on a CPU (in training 2.2 times at 512 tokens, 1.5 at 1,024): a group's
    heads are rows of one product, 256 queries at a time, with keys up to the last of them."""
    out, q, k, v = [], q / q.shape[-1] ** 0.5, k.flatten(0, 1), v.flatten(0, 1)  # k, v (B K, S, E)
    for part, bias in zip(q.split(256, dim=2), mask.split(256, dim=2), strict=True):
        size = part.shape[2]
        seen = k.shape[1] - q.shape[2] + size + sum(done.shape[2] for done in out)
        rows, keys = part.reshape(len(k), -1, k.shape[-1]), k[:, :seen]
        # one new token: keys, a slice of the cache, would be copied if they came second
        scores = (keys @ rows.mT).mT if size == 1 else rows @ keys.mT
        scores = scores.reshape(*part.shape[:3], seen) + bias[..., :seen]  # (B, H, t, s)
        out.append((scores.softmax(-1).view(len(k), -1, seen) @ v[:, :seen]).view(part.shape))
    return torch.cat(out, dim=2)


class Attention(nn.Module):
    def __init__(self, c):
        super().__init__()
        self.head_dim, q_size = c.head_dim, c.num_attention_heads * c.head_dim
        kv_size = c.num_key_value_heads * c.head_dim
        self.q_proj = Linear(c.hidden_size, q_size, bias=c.qkv_bias)
        self.k_proj = Linear(c.hidden_size, kv_size, bias=c.qkv_bias)
        self.v_proj = Linear(c.hidden_size, kv_size, bias=c.qkv_bias)
        self.o_proj = Linear(q_size, c.hidden_size, bias=c.o_bias)
        if c.qk_norm:
            self.q_norm = RMSNorm(c.head_dim, c.rms_norm_eps)
            self.k_norm = RMSNorm(c.head_dim, c.rms_norm_eps)

    def forward(self, x, rope, mask, cache=None, at=None):
        q, k, v = (y.view(*x.shape[:2], -1, self.head_dim)
                   for y in project(x, self.q_proj, self.k_proj, self.v_proj))
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, E)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:  # (2, B, K, S, E), written in place, each row at its own positions
            cache[0][at], cache[1][at] = k.transpose(1, 2), v.transpose(1, 2)
            if mask is not None:  # its keys are the cache's; None: a prompt's own are all
                k, v = cache[:, :, :, : mask.shape[-1]]
        (out,) = project(attend(q, k, v, mask).transpose(1, 2).flatten(2), self.o_proj)
        return out  # (B, T, D)


def swiglu(gate, up):
    """silu(gate) * up (arXiv 2002.05202)."""
    return F.silu(gate) * up


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        gate_up = project(x, self.gate_proj, self.up_proj)
        (out,) = project(recomputed(swiglu, *gate_up), self.down_proj)
        return out


class Block(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, mask, cache=None, at=None):
        x = x + self.self_attn(recomputed(self.input_layernorm, x), rope, mask, cache, at)
        return x + self.mlp(recomputed(self.post_attention_layernorm, x))


class Llama(nn.Module):
    """The decoder. checkpointing = True recomputes each block in the backward pass: less memory."""

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing, self.packed_head = config, False, None
        embedding = torch.empty(config.vocab_size, config.hidden_size)
        self.embed_tokens = nn.Embedding.from_pretrained(embedding, freeze=False)
        self.layers = nn.ModuleList(Block(config) for _ in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = Linear(config.hidden_size, config.vocab_size, bias=False)

    def new_cache(self, rows, size):
        """Room for the keys and values of `size` tokens a row, (layers, 2, B, K, S, E). Prompts are
        padded on the right: a short row's first new token overwrites its first pad."""
        c = self.config
        shape = (c.num_hidden_layers, 2, rows, c.num_key_value_heads, size, c.head_dim)
        return self.norm.weight.new_zeros(shape)

    def forward(self, input_ids, cache=None, positions=None):
        """input_ids (B, T) -> hidden states after the final norm (B, T, D). Rows are padded on the
        right, so that causal attention alone keeps pads out of every token. With a cache: first
        the prompts (positions None), then more tokens at their `positions` (B, T)."""
        x, start = self.embed_tokens(input_ids), positions is None  # (B, T, D)
        if start:
            positions = torch.arange(x.shape[1], device=x.device)[None]  # (1, T)
        # In a cache (B, K, S, E); what it picks is (B, T, K, E), indices around a slice come first
        at = (torch.arange(len(x), device=x.device)[:, None], slice(None), positions)
        mask = self._mask(positions, start)
        angles = positions[:, None, :, None] * rope_frequencies(self.config, x.device)
        rope = [torch.cat(halves, dim=-1).to(x.dtype)  # (B or 1, 1, T, E)
                for halves in ((angles.cos(), angles.cos()), (-angles.sin(), angles.sin()))]
        for i, block in enumerate(self.layers):
            if self.checkpointing and cache is None:
                x = recomputed(block, x, rope, mask)
            else:
                x = block(x, rope, mask, None if cache is None else cache[i], at)
        return self.norm(x)

    def _mask(self, positions, start):
        """None where plain causal attention does; else 0 or -inf to add, (B or 1, 1, T, S)."""
        window, size = self.config.sliding_window or math.inf, positions.shape[1]
        by_hand = positions.device.type == "cpu" and size <= 2048  # see `attend`; memory is T x T
        if start and not by_hand and size <= window:
            return None
        keys = torch.arange(int(positions.max()) + 1, device=positions.device)
        distance = positions[:, None, :, None] - keys
        unseen = (distance < 0) | (distance >= window)
        return self.norm.weight.new_zeros(distance.shape).masked_fill_(unseen, -math.inf)

    def logits(self, hidden):
        """(..., D) -> (..., V)."""
        packed = self.packed_head
        return packed(hidden) if packed else F.linear(hidden, self.output_embedding().weight)

    def output_embedding(self):
        """The module whose weight (V, D) maps a hidden state to the vocabulary."""
        return self.embed_tokens if self.config.tie_word_embeddings else self.lm_head

    @torch.no_grad()
    def pack(self):
        """Puts `Packed` in place of the projections, on a CPU in bfloat16: a token of text takes
        .6 of the time. For predictions only: the plain weights are gone, LoRA's too."""
        weight, able = self.norm.weight, torch.cpu.get_capabilities().get("avx512_bf16")
        able = able and torch.backends.mkldnn.is_available() and weight.device.type == "cpu"
        if weight.dtype == torch.bfloat16 and able:
            for block in self.layers:
                attn, mlp = block.self_attn, block.mlp
                for group in ((attn.q_proj, attn.k_proj, attn.v_proj), (attn.o_proj,),
                              (mlp.gate_proj, mlp.up_proj), (mlp.down_proj,)):
                    group[0].packed = Packed(*group)
            self.packed_head = lay_out(self.output_embedding().weight)
            if not self.config.tie_word_embeddings:
                self.lm_head.weight = None
        return self


# --- loading --------------------------------------------------------------------------------------
def read_json(path):
    """The JSON object in a file; ValueError that names the file when it is missing or no object."""
    try:
        value = json.loads(Path(path).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {getattr(error, 'strerror', None) or error}") from None
    if not isinstance(value, dict):
        raise ValueError(f"{path}: a JSON object is due, found {type(value).__name__}")
    return value


def checkpoint_files(folder):
    """The safetensors files of a folder: those of its index if it has one, else the single file."""
    index, names = Path(folder) / "model.safetensors.index.json", ["model.safetensors"]
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        names = sorted(set(map(str, weight_map.values()))) if isinstance(weight_map, dict) else []
        if not names or any(Path(name).name != name for name in names):
            raise ValueError(f"{index}: weight_map must give names of files in this folder")
    for name in names:
        if not os.path.isfile(Path(folder) / name):
            raise ValueError(f"{folder}: {name} is missing")
    return [Path(folder) / name for name in names]


def compare_tensors(due, found, where):
    """ValueError that names missing, surplus and mis-shaped tensors; both are {name: shape}."""
    wrong = [f"missing {name}" for name in sorted(due.keys() - found.keys())]
    wrong += [f"surplus {name}" for name in sorted(found.keys() - due.keys())]
    wrong += [f"{name} is {list(found[name])}, due is {list(shape)}" for name, shape in due.items()
              if name in found and list(found[name]) != list(shape)]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{where}: the tensors do not fit: {'; '.join(wrong[:5])}{more}")


def disk_name(name):
    """A parameter of Llama -> its name in the checkpoint."""
    return name if name.startswith("lm_head.") else "model." + name


def load_llama(folder, dtype=torch.bfloat16, device="cpu"):
    """A Hugging Face folder -> Llama in eval mode. ValueError that says what is wrong."""
    path, files = Path(folder) / "config.json", checkpoint_files(folder)
    config = LlamaConfig.from_dict(read_json(path), path)
    # Tied checkpoints may repeat the embedding as lm_head; old ones store the rotary table
    unused = ("rotary_emb.inv_freq",) + ("lm_head.weight",) * config.tie_word_embeddings
    found, path_of = {}, {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for key in (key for key in file.keys() if not key.endswith(unused)):
                    part, path_of[key] = file.get_slice(key), path
                    found[key], kind = part.get_shape(), part.get_dtype()
                    if kind not in ("F64", "F32", "F16", "BF16"):  # quantised: needs scales too
                        raise ValueError(f"{path}: {key} is stored as {kind}; floats are due")
        except SafetensorError as error:
            raise ValueError(f"{path}: not a complete safetensors file ({error})") from None
    if config.num_hidden_layers > len(found):  # building a million layers would take for ever
        raise ValueError(f"{folder}: {config.num_hidden_layers} layers, but {len(found)} tensors")
    with torch.device("meta"):  # shapes only: no memory is taken before the checkpoint fits
        llama = Llama(config)
    due = {disk_name(name): parameter.shape for name, parameter in llama.named_parameters()}
    compare_tensors(due, found, folder)
    state = {}
    for name, _ in llama.named_parameters():  # one at a time, cast as it is copied
        with safe_open(path_of[disk_name(name)], "pt") as file:
            state[name] = file.get_tensor(disk_name(name)).to(device, dtype, copy=True)
    llama.load_state_dict(state, assign=True)
    return llama.eval()
