"""Random weights in the shape of Llama-3.2-1B or Llama-3.1-8B: speed and memory need no others.

    python benchmarks/random_llama.py 1b --out models/random-1b    # 2.5 GB; 8b takes 16 GB
    python benchmarks/speed.py --model models/random-1b --cases train/4x2048 explain/8

A Hugging Face folder as any other, in bfloat16, one file a layer, with SmolLM2's tokenizer (its ids
are a part of Llama 3's 128,256). Shapes: config.json of huggingface.co/meta-llama/Llama-3.2-1B and
Llama-3.1-8B.
"""

import argparse
import shutil
import sys
from pathlib import Path

import torch
from tqdm import tqdm

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from model import Llama  # noqa: E402
from plumbing.checkpoint import disk_name, read_config  # noqa: E402
from plumbing.files import write_json, write_tensors  # noqa: E402
from plumbing.script import run_main  # noqa: E402

ROPE = {"rope_type": "llama3", "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}
SHAPES = {
    "1b": {"hidden_size": 2048, "intermediate_size": 8192, "num_hidden_layers": 16, "head_dim": 64,
           "tie_word_embeddings": True, "rope_scaling": ROPE | {"factor": 32.0}},
    "8b": {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32,
           "head_dim": 128, "tie_word_embeddings": False, "rope_scaling": ROPE | {"factor": 8.0}},
}
COMMON = {"model_type": "llama", "architectures": ["LlamaForCausalLM"], "vocab_size": 128256,
          "num_attention_heads": 32, "num_key_value_heads": 8, "max_position_embeddings": 131072,
          "rms_norm_eps": 1e-5, "rope_theta": 500000.0, "hidden_act": "silu",
          "bos_token_id": 1, "eos_token_id": 2, "torch_dtype": "bfloat16"}  # SmolLM2's ids


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("shape", choices=SHAPES)
    add("--out", type=Path, required=True, help="folder to write; must not exist")
    add("--tokenizer", type=Path, default=ROOT / "models" / "smollm2-135m", help="its folder")
    args = parser.parse_args(argv)
    if not (args.tokenizer / "tokenizer.json").is_file():
        raise ValueError(f"{args.tokenizer}: no tokenizer.json there")
    config = COMMON | SHAPES[args.shape]
    with torch.device("meta"):
        named = dict(Llama(read_config(config)).named_parameters())
    args.out.mkdir(parents=True)
    shutil.copyfile(args.tokenizer / "tokenizer.json", args.out / "tokenizer.json")
    torch.manual_seed(0)
    files = {}  # file -> the names of its tensors: a layer's, or those outside all layers
    for name in named:
        layer = name.split(".")[1] if name.startswith("layers.") else "rest"
        files.setdefault(f"model-{layer}.safetensors", []).append(name)
    for file, names in tqdm(files.items(), unit="file"):
        tensors = {name: torch.empty(named[name].shape, dtype=torch.bfloat16) for name in names}
        for name, tensor in tensors.items():
            tensor.fill_(1) if "norm" in name else tensor.normal_(std=0.02)
        write_tensors(args.out / file, {disk_name(name): one for name, one in tensors.items()})
    weight_map = {disk_name(name): file for file, names in files.items() for name in names}
    write_json(args.out / "model.safetensors.index.json", {"weight_map": weight_map})
    write_json(args.out / "config.json", config)  # last: without it nothing loads
    print(f"{sum(map(torch.Tensor.numel, named.values())):,} random weights in {args.out}")


if __name__ == "__main__":
    run_main(main)
