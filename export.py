"""A run for other tools: LoRA merged into the base, or LoRA alone.

    python export.py --run runs/x --out merged              # a plain Hugging Face folder
    python export.py --run runs/x --out adapter --adapter   # LoRA for engines that take no head

The merged folder opens wherever its base does. The score head lies next to it in score.safetensors,
and `load_run("merged")` gives the run's predictions. A README.md in each says how to prompt it.
"""

import argparse
import shutil
from contextlib import contextmanager
from pathlib import Path

from safetensors.torch import load_file

from clsgen import CLSGen, LoRALinear
from plumbing.adapter import NO_CLASSIFIER, adapter_config, adapter_tensors, lora_alone
from plumbing.checkpoint import (
    ADAPTER_CONFIG, INDEX, base_fingerprint, checkpoint_files, disk_name, find_base, load_llama)
from plumbing.export_readme import adapter_readme, merged_readme
from plumbing.files import read_json, write_atomically, write_json, write_tensors
from plumbing.script import Help, refuse, run_main
from run import Run, load_run, reads_last_prompt_token


def main(argv=None):
    args = parse(argv)
    run = load_run(args.run, args.model, args.dtype, args.device, pack=False)
    if not run.has_lora:
        raise ValueError(f"{args.run} is merged already")
    if args.adapter:
        write_adapter(run, args.out)
        print(f"adapter in {args.out}; its README.md has the prompt")
    else:
        merge(run, Path(args.model or find_base(run.about["base"])), args.out)
        print(f"merged model in {args.out}; its README.md says how to use it elsewhere")


@contextmanager
def whole_folder(out):
    """Gives a folder to write into, which is called `out` once all is there.

    So a stop leaves no half folder; one that a killed process has left is replaced.
    """
    folder = out.with_name(f".{out.name}.unfinished")
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    try:
        yield folder
    except BaseException:  # Ctrl-C, too
        shutil.rmtree(folder, ignore_errors=True)
        raise
    folder.rename(out)


def write_adapter(run, out):
    """Writes LoRA alone, in peft's layout of a causal LM.

    Some engines refuse a run folder, which has the score head too: vLLM refuses `modules_to_save`,
    and llama.cpp's converter every tensor that is no A or B of a LoRA.
    """
    tensors = lora_alone(adapter_tensors(run.model))
    with whole_folder(out) as folder:
        write_tensors(folder / "adapter_model.safetensors", tensors)
        config = adapter_config(run.about["lora"], run.about["base"], "CAUSAL_LM")
        write_json(folder / "adapter_config.json", config)
        write_atomically(folder / "README.md", adapter_readme(run))


def merge(run, base, out):
    """Writes the run as a plain Hugging Face folder, in the dtype and the shards of its base."""
    adapted = {}  # name on disk -> LoRALinear
    for name, module in run.llama.named_modules():
        if isinstance(module, LoRALinear):
            adapted[disk_name(name) + ".weight"] = module

    with whole_folder(out) as folder:
        # the base's files, with LoRA in its weights
        weights = checkpoint_files(base)
        for path in weights:
            tensors = load_file(path)
            for name in tensors.keys() & adapted.keys():
                tensors[name] = merged_weight(tensors[name], adapted[name])
            write_tensors(folder / path.name, tensors)
        left_out = [ADAPTER_CONFIG]
        if weights[0].name == "model.safetensors":
            left_out.append(INDEX)  # a leftover: model.safetensors wins over it
        for path in base.iterdir():  # config, tokenizer, index, chat template
            is_wanted = path.suffix in (".json", ".model", ".jinja", ".txt")
            if is_wanted and path.is_file() and path.name not in left_out:
                shutil.copyfile(path, folder / path.name)

        # the score head, in a file of its own since other tools take no surplus tensor
        head = run.model.parameters_by_part()["head"]
        write_tensors(folder / "score.safetensors", head)

        # what else a prediction needs; the golden row is that of merged weights
        merged = CLSGen(load_llama(folder, run.llama.norm.weight.dtype, run.device))
        merged.load_state_dict(head, strict=False)
        golden = Run(merged, run.prompts, run.fitted, has_lora=False).golden()
        write_json(folder / "clsgen.json", {
            **run.about,
            "base": str(out),
            "base_fingerprint": base_fingerprint(folder),
            "prompt_frame": run.prompts.rendered(),
            "golden": golden,
        })
        has_plain_head = run.fitted.scorer == "head" and reads_last_prompt_token(run.model)
        if read_json(folder / "config.json")["model_type"] in NO_CLASSIFIER:
            has_plain_head = False
        write_atomically(folder / "README.md", merged_readme(run, has_plain_head))


def merged_weight(weight, layer):
    """W + (alpha / rank) B A, summed in float32 and cast once to the dtype of W."""
    product = layer.lora_B.weight @ (layer.scale * layer.lora_A.weight)
    return (weight.float() + product.detach().cpu()).to(weight.dtype)


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0], formatter_class=Help)
    add = parser.add_argument
    add("--run", required=True, help="a run folder of train.py")
    add("--out", required=True, type=Path, help="the folder to write; must not exist")
    add("--adapter", action="store_true",
        help="LoRA alone, for engines that refuse a run folder for its score head")
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
