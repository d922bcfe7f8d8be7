"""A run for other tools: LoRA merged into the base, as a plain Hugging Face folder.

    python export.py --run runs/x --out merged

The folder opens wherever its base does. The score head lies next to it in score.safetensors, and
`load_run("merged")` gives the run's predictions.
"""

import argparse
import shutil
from pathlib import Path

from safetensors.torch import load_file

from clsgen import CLSGen, LoRALinear
from plumbing.adapter import HEAD, adapter_tensors
from plumbing.checkpoint import (
    ADAPTER_CONFIG, INDEX, base_fingerprint, checkpoint_files, disk_name, find_base, load_llama)
from plumbing.files import write_json, write_tensors
from plumbing.script import Help, refuse, run_main
from run import Run, load_run


def main(argv=None):
    args = parse(argv)
    run = load_run(args.run, args.model, args.dtype, args.device, pack=False)
    merge(run, Path(args.model or find_base(run.about["base"])), args.out)
    print(f"merged model in {args.out}")


def merge(run, base, out):
    """Writes the run as a plain Hugging Face folder, in the dtype and the shards of its base."""
    if not run.has_lora:
        raise ValueError("this run is merged already")
    adapted = {}  # name on disk -> LoRALinear
    for name, module in run.llama.named_modules():
        if isinstance(module, LoRALinear):
            adapted[disk_name(name) + ".weight"] = module

    # under another name until all is there, so that a stop leaves no half folder
    folder = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()

    # the base's files, with LoRA in its weights
    weights = checkpoint_files(base)
    for path in weights:
        tensors = load_file(path)
        for name in tensors.keys() & adapted.keys():
            tensors[name] = merged_weight(tensors[name], adapted[name])
        write_tensors(folder / path.name, tensors)
    left_out = [ADAPTER_CONFIG]
    if weights[0].name == "model.safetensors":
        left_out.append(INDEX)  # of other files
    for path in base.iterdir():  # config, tokenizer, index, chat template
        is_wanted = path.suffix in (".json", ".model", ".jinja", ".txt")
        if is_wanted and path.is_file() and path.name not in left_out:
            shutil.copyfile(path, folder / path.name)

    # the score head, and what else a prediction needs; the golden row is that of merged weights
    write_tensors(folder / "score.safetensors", {HEAD: adapter_tensors(run.model)[HEAD]})
    merged = CLSGen(load_llama(folder, run.llama.norm.weight.dtype, run.device))
    merged.score = run.model.score
    golden = Run(merged, run.prompts, run.fitted, has_lora=False).golden()
    write_json(folder / "clsgen.json", {
        **run.about,
        "base": str(out),
        "base_fingerprint": base_fingerprint(folder),
        "golden": golden,
    })
    folder.rename(out)


def merged_weight(weight, layer):
    """W + (alpha / rank) B A, summed in float32 and cast once to the dtype of W."""
    product = layer.lora_B.weight @ (layer.scale * layer.lora_A.weight)
    return (weight.float() + product.detach().cpu()).to(weight.dtype)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    add = parser.add_argument
    add("--run", required=True, help="a run folder of train.py")
    add("--out", required=True, type=Path, help="the folder to write; must not exist")
    add("--model", help="the base model's folder, if it has moved")
    add("--dtype", choices=["auto", "float32", "bfloat16", "float16"],
        help="of later predictions (default: the run's); the weights keep the base's")
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    args = parser.parse_args(argv)

    problems = []
    if args.out.exists():
        problems.append(f"{args.out} exists")
    if not args.out.parent.is_dir():
        problems.append(f"--out {args.out}: no such folder")
    refuse(problems)
    return args


if __name__ == "__main__":
    run_main(main)
