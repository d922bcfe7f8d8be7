"""A Llama-style transformer in plain PyTorch, loaded from a Hugging Face folder.

    llama = load_llama("models/smollm2-135m")     # config.json, *.safetensors
    hidden = llama(input_ids)                      # (B, T) -> (B, T, D), after the final norm
    logits = llama.logits(hidden)                  # (..., D) -> (..., V)

Llama (arXiv 2302.13971, 2407.21783): RMSNorm before each block, rotary positions, grouped-query
attention, SwiGLU. Mistral (2310.06825) adds a sliding window, Qwen2 biases on q, k and v, Qwen3 a
norm on each q and k head: fields of one config, not subclasses. Module names are the checkpoint's
parameter names. Reference: github.com/huggingface/transformers, models/llama/modeling_llama.py.

Notation: B rows, T tokens of this call, S cached positions, D hidden size, H heads, K key/value
heads, E size of one head, V vocabulary.
"""

import json
import math
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
SIZES = ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "head_dim",
         "num_attention_heads", "num_key_value_heads", "max_position_embeddings")
# Keys that would change the computation, with the one value of each that we compute
FIXED = {"hidden_act": "silu", "mlp_bias": False, "attention_dropout": 0.0, "rope_interleaved": False,
         "partial_rotary_factor": 1.0, "quantization_config": None}
USED = {"model_type", "rms_norm_eps", "tie_word_embeddings", "attention_bias", "sliding_window",
        "use_sliding_window", "layer_types", "rope_theta", "rope_scaling", "rope_parameters"}
HARMLESS = set(
    "architectures _name_or_path transformers_version torch_dtype dtype use_cache bos_token_id"
    " eos_token_id pad_token_id initializer_range max_window_layers pretraining_tp is_llama_config"
    " output_attentions output_hidden_states return_dict id2label label2id problem_type"
    " chunk_size_feed_forward is_encoder_decoder transformers.js_config".split()
)
# The numbers that each kind of rope scaling needs
ROPE_TYPES = {"default": (), "linear": ("factor",), "llama3": (
    "factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings")}


@dataclass
class LlamaConfig:
    """The architecture, under config.json's names. sliding_window None: attention sees all."""

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_hidden_layers: int
    head_dim: int
    num_attention_heads: int
    num_key_value_heads: int
    max_position_embeddings: int
    rms_norm_eps: float
    rope_theta: float
    rope_scaling: dict | None = None
    tie_word_embeddings: bool = False
    qkv_bias: bool = False
    o_bias: bool = False
    qk_norm: bool = False
    sliding_window: int | None = None

    @classmethod
    def from_dict(cls, raw, name="config.json"):
        """config.json's content -> LlamaConfig. Every key is used, known to be harmless, or refused
        by name (ValueError); any other gives one warning line."""

        def refuse(key, value, due):
            raise ValueError(f"{name}: {key} is {value!r}; supported is {due}")

        def number(key, where):
            if type(where.get(key)) not in (int, float) or not 0 < where[key] < math.inf:
                refuse(key, where.get(key), "a number above 0")
            return float(where[key])

        family, heads = raw.get("model_type"), raw.get("num_attention_heads")
        if family not in FAMILIES:
            refuse("model_type", family, ", ".join(FAMILIES))
        for key, value in FIXED.items():
            if raw.get(key, value) != value:
                refuse(key, raw[key], repr(value))
        # What transformers, too, takes for an absent key; Qwen3's head_dim is no such ratio
        sizes = {"num_key_value_heads": heads, **{key: raw[key] for key in SIZES if key in raw}}
        if sizes.get("head_dim") is None and family != "qwen3" and heads:
            sizes["head_dim"] = raw.get("hidden_size", 0) // heads
        for key in SIZES:
            if type(sizes.get(key)) is not int or sizes[key] < 1:
                refuse(key, sizes.get(key), "a whole number above 0")
        if heads % sizes["num_key_value_heads"]:
            refuse("num_key_value_heads", sizes["num_key_value_heads"], f"a divisor of {heads} heads")
        if sizes["head_dim"] % 2:
            refuse("head_dim", sizes["head_dim"], "an even number")

        # Rotary positions: `rope_theta` and `rope_scaling`, or `rope_parameters` of transformers 5
        scaling = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        kind = scaling.get("rope_type", scaling.get("type", "default"))
        if kind not in ROPE_TYPES:
            refuse("rope_type", kind, ", ".join(ROPE_TYPES))
        numbers = {key: number(key, scaling) for key in ROPE_TYPES[kind]}

        # A window on all layers is Mistral's; Qwen2 stores one that it does not use
        windowed = family == "mistral" or bool(raw.get("use_sliding_window"))
        layers = set(raw.get("layer_types") or ())
        if windowed and (family != "mistral" or "sliding_window" not in raw):
            refuse("sliding_window", raw.get("sliding_window"), "mistral's, a number or null")
        if layers - {"sliding_attention" if windowed else "full_attention"}:
            refuse("layer_types", sorted(layers), "one kind of attention for all layers")
        if unknown := sorted(raw.keys() - USED - FIXED.keys() - HARMLESS - set(SIZES)):
            print(f"warning: {name}: unknown keys: {', '.join(unknown)}", file=sys.stderr)
        return cls(
            **sizes,
            rms_norm_eps=number("rms_norm_eps", raw),
            rope_theta=number("rope_theta", {"rope_theta": 10000.0, **raw, **scaling}),
            rope_scaling={"rope_type": kind, **numbers} if numbers else None,
            tie_word_embeddings=bool(raw.get("tie_word_embeddings", False)),
            qkv_bias=family == "qwen2" or bool(raw.get("attention_bias")),
            o_bias=family != "qwen2" and bool(raw.get("attention_bias")),
            qk_norm=family == "qwen3",
            sliding_window=raw["sliding_window"] if windowed else None,
        )


# --- the layers -----------------------------------------------------------------------------------


class RMSNorm(nn.Module):
    """x / sqrt(mean(x^2) + eps) * weight, the mean in float32 (arXiv 1910.07467)."""

    def __init__(self, size, eps):
        super().__init__()
        self.weight = nn.Parameter(torch.ones(size))
        self.eps = eps

    def forward(self, x):
        wide = x.float()
        wide = wide * torch.rsqrt(wide.pow(2).mean(-1, keepdim=True) + self.eps)
        return self.weight * wide.to(x.dtype)


def rope_frequencies(config, device=None):
    """The E/2 angles per position, float32 (arXiv 2104.09864), stretched as `rope_scaling` says."""
    exponents = torch.arange(0, config.head_dim, 2, device=device).float() / config.head_dim
    freq = 1.0 / config.rope_theta**exponents
    scaling = config.rope_scaling
    if scaling is None:
        return freq
    if scaling["rope_type"] == "linear":
        return freq / scaling["factor"]
    # Llama 3.1: long waves are slowed down by `factor`, short ones kept, those between blended
    # (transformers, modeling_rope_utils.py, _compute_llama3_parameters).
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    turns = scaling["original_max_position_embeddings"] * freq / (2 * math.pi)
    keep = ((turns - low) / (high - low)).clamp(0, 1)
    return keep * freq + (1 - keep) * freq / scaling["factor"]


def rotate(x, cos, sin):
    """Rotary positions in the split-halves layout that Hugging Face checkpoints are stored for.

        x = [ a_0 a_1 ... | b_0 b_1 ... ]   pair i is (a_i, b_i): first half with second half
        -> [ a cos - b sin | b cos + a sin ]
    The papers pair neighbours (x_0, x_1); with these weights that gives twenty fluent tokens, then
    nonsense. x (B, heads, T, E); cos, sin (B or 1, 1, T, E), each half the same angles.
    """
    a, b = x.chunk(2, dim=-1)
    return x * cos + torch.cat((-b, a), dim=-1) * sin


class KVCache:
    """Keys and values of all layers, written in place; row b's next token goes to its own position.

    Rows are padded on the right, so a short row's first answer token overwrites its first pad, and
    nothing ever attends to a position beyond the row's own.
    """

    def __init__(self, config, batch, size, dtype, device):
        shape = (config.num_hidden_layers, batch, config.num_key_value_heads, size, config.head_dim)
        self.k = torch.zeros(shape, dtype=dtype, device=device)
        self.v = torch.zeros(shape, dtype=dtype, device=device)

    def write(self, layer, k, v, positions):
        """k, v (B, K, T, E) at positions (B, T) -> everything up to the last position, (B, K, S, E)."""
        rows = torch.arange(k.shape[0], device=k.device)[:, None]
        self.k[layer, rows, :, positions] = k.transpose(1, 2)
        self.v[layer, rows, :, positions] = v.transpose(1, 2)
        return self.k[layer], self.v[layer]


class Attention(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.layer, self.head_dim = layer, config.head_dim
        size, q_size = config.hidden_size, config.num_attention_heads * config.head_dim
        kv_size = config.num_key_value_heads * config.head_dim
        self.q_proj = nn.Linear(size, q_size, bias=config.qkv_bias)
        self.k_proj = nn.Linear(size, kv_size, bias=config.qkv_bias)
        self.v_proj = nn.Linear(size, kv_size, bias=config.qkv_bias)
        self.o_proj = nn.Linear(q_size, size, bias=config.o_bias)
        if config.qk_norm:
            self.q_norm = RMSNorm(config.head_dim, config.rms_norm_eps)
            self.k_norm = RMSNorm(config.head_dim, config.rms_norm_eps)

    def forward(self, x, rope, mask, cache=None, positions=None):
        heads = (*x.shape[:2], -1, self.head_dim)
        q, k, v = self.q_proj(x).view(heads), self.k_proj(x).view(heads), self.v_proj(x).view(heads)
        if hasattr(self, "q_norm"):
            q, k = self.q_norm(q), self.k_norm(k)
        q, k, v = q.transpose(1, 2), k.transpose(1, 2), v.transpose(1, 2)  # (B, H or K, T, E)
        q, k = rotate(q, *rope), rotate(k, *rope)
        if cache is not None:
            k_all, v_all = cache.write(self.layer, k, v, positions)
            if mask is not None:  # beyond the prompt: attend to the cache as well
                k, v = k_all[:, :, : mask.shape[-1]], v_all[:, :, : mask.shape[-1]]
        out = F.scaled_dot_product_attention(
            q, k, v, attn_mask=mask, is_causal=mask is None, enable_gqa=q.shape[1] != k.shape[1]
        )
        return self.o_proj(out.transpose(1, 2).flatten(2))  # (B, T, D)


class MLP(nn.Module):
    def __init__(self, config):
        super().__init__()
        self.gate_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.up_proj = nn.Linear(config.hidden_size, config.intermediate_size, bias=False)
        self.down_proj = nn.Linear(config.intermediate_size, config.hidden_size, bias=False)

    def forward(self, x):
        return self.down_proj(F.silu(self.gate_proj(x)) * self.up_proj(x))


class Block(nn.Module):
    def __init__(self, config, layer):
        super().__init__()
        self.input_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.self_attn = Attention(config, layer)
        self.post_attention_layernorm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        self.mlp = MLP(config)

    def forward(self, x, rope, mask, cache=None, positions=None):
        x = x + self.self_attn(self.input_layernorm(x), rope, mask, cache, positions)
        return x + self.mlp(self.post_attention_layernorm(x))


class Llama(nn.Module):
    """The decoder. `checkpointing = True` recomputes each block in the backward pass (less memory)."""

    def __init__(self, config):
        super().__init__()
        self.config, self.checkpointing = config, False
        self.embed_tokens = nn.Embedding(config.vocab_size, config.hidden_size)
        self.layers = nn.ModuleList(Block(config, i) for i in range(config.num_hidden_layers))
        self.norm = RMSNorm(config.hidden_size, config.rms_norm_eps)
        if not config.tie_word_embeddings:
            self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)

    def forward(self, input_ids, cache=None, positions=None):
        """input_ids (B, T) -> hidden states after the final norm (B, T, D).

        Rows are padded on the right, so causal attention alone keeps pads out of every real token.
        With a cache: first the prompts (positions None), then tokens at their `positions` (B, T).
        """
        x = self.embed_tokens(input_ids)  # (B, T, D)
        start = torch.arange(x.shape[1], device=x.device)[None]  # (1, T)
        mask = self._mask(start if positions is None else positions, positions is not None)
        positions = start if positions is None else positions
        angles = positions[..., None] * rope_frequencies(self.config, x.device)  # (1 or B, T, E/2)
        angles = torch.cat((angles, angles), dim=-1)[:, None]
        rope = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        positions = positions.expand(x.shape[0], -1)
        for block in self.layers:
            if self.checkpointing and torch.is_grad_enabled():
                x = checkpoint(block, x, rope, mask, use_reentrant=False)
            else:
                x = block(x, rope, mask, cache, positions)
        return self.norm(x)

    def _mask(self, positions, cached):
        """None where plain causal attention does; else who may look where, (B or 1, 1, T, S)."""
        window, size = self.config.sliding_window, positions.shape[1]
        if not cached and (window is None or size <= window):
            return None
        keys = torch.arange(int(positions.max()) + 1, device=positions.device)
        queries = positions[:, None, :, None]
        mask = keys <= queries
        return mask if window is None else mask & (keys > queries - window)

    def logits(self, hidden):
        """(..., D) -> (..., V)."""
        head = self.embed_tokens if self.config.tie_word_embeddings else self.lm_head
        return F.linear(hidden, head.weight)


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
    folder = Path(folder)
    if not folder.is_dir():
        raise ValueError(f"{folder}: no such folder")
    index = folder / "model.safetensors.index.json"
    names = {"model.safetensors"}
    if index.exists():
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise ValueError(f"{index}: has no weight_map")
        names = {str(name) for name in weight_map.values()}
        if strange := [name for name in sorted(names) if Path(name).name != name]:
            raise ValueError(f"{index}: {strange[0]!r} is not a file name")
    if missing := [name for name in sorted(names) if not (folder / name).is_file()]:
        raise ValueError(f"{folder}: {missing[0]} is missing")
    return [folder / name for name in sorted(names)]


def compare_tensors(due, found, where):
    """ValueError that names every missing, surplus and mis-shaped tensor; both are {name: shape}."""
    wrong = [f"missing {name}" for name in sorted(due.keys() - found.keys())]
    wrong += [f"surplus {name}" for name in sorted(found.keys() - due.keys())]
    wrong += [f"{name} is {tuple(found[name])}, due is {tuple(shape)}"
              for name, shape in due.items() if name in found and tuple(found[name]) != tuple(shape)]
    if wrong:
        more = f" and {len(wrong) - 5} more" if len(wrong) > 5 else ""
        raise ValueError(f"{where}: the tensors do not fit: {'; '.join(wrong[:5])}{more}")


def disk_name(name):
    """A parameter of Llama -> its name in the checkpoint."""
    return name if name.startswith("lm_head.") else "model." + name


def load_llama(folder, dtype=torch.bfloat16, device="cpu"):
    """A Hugging Face folder -> Llama in eval mode. ValueError that says what is wrong."""
    folder = Path(folder)
    files = checkpoint_files(folder)
    config = LlamaConfig.from_dict(read_json(folder / "config.json"), folder / "config.json")
    with torch.device("meta"):  # shapes only: no memory is taken before the checkpoint fits
        llama = Llama(config).to(dtype)
    # Tied checkpoints may repeat the embedding as lm_head; old ones store the rotary table
    unused = ("rotary_emb.inv_freq",) + ("lm_head.weight",) * config.tie_word_embeddings
    found, path_of = {}, {}
    for path in files:
        try:
            with safe_open(path, "pt") as file:
                for key in file.keys():
                    if not key.endswith(unused):
                        found[key], path_of[key] = file.get_slice(key).get_shape(), path
        except SafetensorError as error:
            raise ValueError(f"{path}: not a complete safetensors file ({error})") from None
    parameters = {disk_name(name): parameter for name, parameter in llama.named_parameters()}
    compare_tensors({key: p.shape for key, p in parameters.items()}, found, folder)
    llama.to_empty(device=device)
    parameters = {disk_name(name): parameter for name, parameter in llama.named_parameters()}
    with torch.no_grad():
        for path in files:
            with safe_open(path, "pt") as file:
                for key in (key for key in path_of if path_of[key] == path):
                    parameters[key].copy_(file.get_tensor(key))  # one at a time, cast on the way
    return llama.eval()
