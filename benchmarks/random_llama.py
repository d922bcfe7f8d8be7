"""Random weights in the shape of Llama-3.2-1B or Llama-3.1-8B: enough for speed and memory.

    python benchmarks/random_llama.py 1b --out models/random-1b    # 2.5 GB; 8b takes 16 GB
    python benchmarks/speed.py --model models/random-1b --cases train/4x2048 explain/8

Writes a Hugging Face folder like any other, in bfloat16, one file a layer, with SmolLM2's tokenizer
(its ids are among Llama 3's 128,256). The shapes are those of config.json at
huggingface.co/meta-llama/Llama-3.2-1B and Llama-3.1-8B.
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

ROPE = {
    "rope_type": "llama3",
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
SHAPES = {
    "1b": {
        "hidden_size": 2048,
        "intermediate_size": 8192,
        "num_hidden_layers": 16,
        "head_dim": 64,
        "tie_word_embeddings": True,
        "rope_scaling": {**ROPE, "factor": 32.0},
    },
    "8b": {
        "hidden_size": 4096,
        "intermediate_size": 14336,
        "num_hidden_layers": 32,
        "head_dim": 128,
        "tie_word_embeddings": False,
        "rope_scaling": {**ROPE, "factor": 8.0},
    },
}
COMMON = {
    "model_type": "llama",
    "architectures": ["LlamaForCausalLM"],
    "vocab_size": 128256,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "max_position_embeddings": 131072,
    "rms_norm_eps": 1e-5,
    "rope_theta": 500000.0,
    "hidden_act": "silu",
    "bos_token_id": 1,  # SmolLM2's ids
    "eos_token_id": 2,
    "torch_dtype": "bfloat16",
}


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("shape", choices=SHAPES)
    add("--out", type=Path, required=True, help="folder to write; must not exist")
    add("--tokenizer", type=Path, default=ROOT / "models" / "smollm2-135m", help="its folder")
    args = parser.parse_args(argv)
    if not (args.tokenizer / "tokenizer.json").is_file():
        raise ValueError(f"{args.tokenizer}: no tokenizer.json there")

    # the names and shapes of all tensors, without their memory
    config = {**COMMON, **SHAPES[args.shape]}
    with torch.device("meta"):
        llama = Llama(read_config(config))
    parameters = dict(llama.named_parameters())

    args.out.mkdir(parents=True)
    shutil.copyfile(args.tokenizer / "tokenizer.json", args.out / "tokenizer.json")

    # one file after the other
    torch.manual_seed(0)
    file_of_tensor = {}
    for file, names in tqdm(names_by_file(parameters).items(), unit="file"):
        tensors = {}
        for name in names:
            tensors[disk_name(name)] = random_tensor(name, parameters[name].shape)
            file_of_tensor[disk_name(name)] = file
        write_tensors(args.out / file, tensors)

    count = sum(parameter.numel() for parameter in parameters.values())
    index = {"metadata": {"total_size": 2 * count}, "weight_map": file_of_tensor}
    write_json(args.out / "model.safetensors.index.json", index)
    write_json(args.out / "config.json", config)  # last: without it nothing loads
    print(f"{count:,} random weights in {args.out}")


def names_by_file(parameters):
    """{file: the names of its tensors}: those of one layer, or those outside all layers."""
    files = {}
    for name in parameters:
        layer = "rest"
        if name.startswith("layers."):
            layer = name.split(".")[1]
        names = files.setdefault(f"model-{layer}.safetensors", [])
        names.append(name)
    return files


def random_tensor(name, shape):
    """Ones for a norm, small normal numbers for everything else."""
    tensor = torch.empty(shape, dtype=torch.bfloat16)
    if "norm" in name:
        return tensor.fill_(1)
    return tensor.normal_(std=0.02)


if __name__ == "__main__":
    run_main(main)
