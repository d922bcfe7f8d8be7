"""What Llama-3.1-8B needs: the memory of a training step, and the speed of writing on a GPU.

    python benchmarks/llama8b.py                     # counts the memory, on any machine
    python benchmarks/llama8b.py --device cuda       # measures it on a GPU, and the writing, too
    python benchmarks/llama8b.py --device cuda --peer    # the writing of transformers

The weights are random, in the shape of benchmarks/random_llama.py, and are made on the device.
Counting runs a step on PyTorch's "meta" device, whose tensors have shapes but no memory, and adds
up what the forward pass keeps for the backward pass.
"""

import argparse
import json
import sys
import time
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import model as model_file  # noqa: E402
from clsgen import CLSGen, Reading, add_lora, joint_loss, total_loss  # noqa: E402
from data import Example, collate  # noqa: E402
from plumbing.checkpoint import read_config  # noqa: E402
from plumbing.files import write_json  # noqa: E402
from plumbing.script import run_main, versions  # noqa: E402
from random_llama import COMMON, SHAPES  # noqa: E402

GIB = 2**30
LENGTH = 2048  # tokens of a training row
ANSWER = 128  # of them
PROMPT = 1500  # tokens of a prompt that an explanation follows
NEW_TOKENS = 48


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--shape", default="8b", choices=SHAPES)
    add("--device", default="meta", help="meta: count; cuda: measure")
    add("--peer", action="store_true", help="measure the writing of transformers instead")
    add("--out", type=Path, help="the numbers as JSON")
    args = parser.parse_args(argv)

    if args.device != "meta" and not torch.cuda.is_available():
        raise ValueError(f"--device {args.device}: PyTorch finds no GPU; without the flag the "
                         "memory is counted on any machine")
    if args.peer and args.device == "meta":
        raise ValueError("--peer measures on a GPU only: give --device cuda as well")
    report = {"command": ["benchmarks/llama8b.py", *(argv or sys.argv[1:])], "versions": versions()}
    if args.device != "meta":
        report["gpu"] = torch.cuda.get_device_name(args.device)
    if args.peer:
        report["writing"] = measure_writing(peer_writer(args), args)
    else:
        report["training"] = training_memory(args)
        if args.device != "meta":
            report["writing"] = measure_writing(our_writer(args), args)
    if args.out:
        write_json(args.out, report)


def random_config(args):
    return {**COMMON, **SHAPES[args.shape]}


def random_model(args):
    """A CLSGen with random weights in bfloat16 and a LoRA of rank 16, on the device."""
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        llama = model_file.Llama(read_config(random_config(args)))
    torch.set_default_dtype(torch.float32)
    return CLSGen(add_lora(llama, rank=16, alpha=32.0))


# --- training -------------------------------------------------------------------------------------
def training_memory(args):
    """GiB of a training step: counted on the meta device, measured on a GPU."""
    model = random_model(args)
    parts = model.parameters_by_part()
    trained = [*parts["lora"].values(), *parts["head"].values()]
    n_trained = sum(parameter.numel() for parameter in trained)
    n_frozen = sum(parameter.numel() for parameter in parts["frozen"].values())
    # float32, with a gradient and the two moments of AdamW
    found = {"base": 2 * n_frozen / GIB, "lora": 16 * n_trained / GIB}
    print(f"the base {found['base']:.1f} GiB, LoRA with its optimizer {found['lora']:.2f} GiB")

    optimizer = torch.optim.AdamW(trained, lr=1e-4)
    for rows, checkpointing in ((1, False), (4, False), (1, True), (4, True)):
        model.model.checkpointing = checkpointing
        name = f"{rows} x {LENGTH}" + (", checkpointing" if checkpointing else "")
        if args.device == "meta":
            found[name] = kept_bytes(model, rows) / GIB
            print(f"{name}: {found[name]:.2f} GiB kept for the backward pass")
            continue

        torch.cuda.reset_peak_memory_stats()
        seconds = []
        for _ in range(3):
            torch.cuda.synchronize()
            started = time.perf_counter()
            step_loss(model, rows, args.device).backward()
            optimizer.step()
            optimizer.zero_grad()
            torch.cuda.synchronize()
            seconds.append(time.perf_counter() - started)
        peak = torch.cuda.max_memory_allocated() / GIB
        rate = rows * LENGTH / min(seconds)
        found[name] = {"peak_gib": peak, "tokens_per_second": rate}
        print(f"{name}: {peak:.1f} GiB at the peak, {rate:.0f} tokens/s", flush=True)
    return found


def step_loss(model, rows, device):
    """The loss of rows of random tokens."""
    examples = []
    for i in range(rows):
        ids = torch.randint(10, 40000, (LENGTH,)).tolist()
        examples.append(Example(i, ids[:-ANSWER], ids[-ANSWER:], label=i % 2, tokens_cut=0))
    batch = collate(examples, device)
    z, logits = model(batch)
    if device == "meta":  # joint_loss looks at the labels, which have no values here
        return z.sum() + torch.nn.functional.cross_entropy(logits.float(), batch.targets)
    terms = joint_loss(z, batch.labels, logits, batch.targets, rows, len(batch.targets))
    return total_loss(terms, {})


class FusedAttention(torch.autograd.Function):
    """What a fused kernel keeps: its input, its output, and a number for each query."""

    @staticmethod
    def forward(ctx, q, k, v):
        y = torch.empty_like(q)
        ctx.save_for_backward(q, k, v, y, q.new_empty(q.shape[:3], dtype=torch.float32))
        return y


def kept_bytes(model, rows):
    """Bytes of the tensors that a forward pass keeps, parameters left out, each memory once."""
    # PyTorch's own attention takes its slow kernel on the meta device
    model_file.attend = lambda q, k, v, mask: FusedAttention.apply(q, k, v)
    weights = {parameter.untyped_storage()._cdata for parameter in model.parameters()}
    kept = {}  # {memory: its tensor}; held here, so that no memory is counted as another's

    def keep(tensor):
        memory = tensor.untyped_storage()._cdata
        if memory not in weights:
            kept[memory] = tensor
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = step_loss(model, rows, "meta")
    total = sum(tensor.untyped_storage().nbytes() for tensor in kept.values())
    del loss
    return total


# --- writing --------------------------------------------------------------------------------------
def our_writer(args):
    """A function of prompts (B, T) that writes NEW_TOKENS tokens after each."""
    model = random_model(args)

    def write(ids):
        prompt_end = torch.full((len(ids),), ids.shape[1] - 1, device=ids.device)
        reading = Reading(model, ids, prompt_end, NEW_TOKENS)
        yield
        yield from reading.write([0], NEW_TOKENS)

    return write


def peer_writer(args):
    """The same by transformers, without LoRA and without a probability."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    torch.backends.cuda.enable_cudnn_sdp(True)  # attention.py has switched it off for ours
    config = LlamaConfig(**random_config(args), attn_implementation="sdpa")
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        model = LlamaForCausalLM(config).eval()
    torch.set_default_dtype(torch.float32)

    @torch.inference_mode()
    def write(ids):
        cache = DynamicCache()
        for _ in range(NEW_TOKENS + 1):
            output = model(ids, past_key_values=cache, use_cache=True, logits_to_keep=1)
            ids = output.logits[:, -1].argmax(-1)[:, None]
            yield

    return write


def measure_writing(write, args):
    """Seconds of the prompts, tokens a second after them, peak memory, and the kernels used."""
    found = {}
    for rows in (1, 8, 32):
        ids = torch.randint(10, 40000, (rows, PROMPT), device=args.device)
        torch.cuda.reset_peak_memory_stats()
        for _ in range(2):  # the first time warms up
            torch.cuda.synchronize()
            times = [time.perf_counter()]
            for _ in write(ids):
                torch.cuda.synchronize()
                times.append(time.perf_counter())
        seconds = (times[-1] - times[2]) / (len(times) - 3)  # of a token
        found[rows] = {
            "prompt_seconds": times[1] - times[0],
            "tokens_per_second": rows / seconds,
            "peak_gib": torch.cuda.max_memory_allocated() / GIB,
            "prompt_kernels": kernels(write, ids, 1),
            "token_kernels": kernels(write, ids, 3),
        }
        print(json.dumps({rows: found[rows]}, indent=1), flush=True)
    return found


def kernels(write, ids, steps):
    """{kernel: its share of the GPU's time} of the last of some steps, the largest eight."""
    from torch.profiler import ProfilerActivity, profile

    writing = iter(write(ids))
    for _ in range(steps - 1):
        next(writing)
    with profile(activities=[ProfilerActivity.CUDA]) as found:
        next(writing)
        torch.cuda.synchronize()
    times = {event.key: event.device_time_total for event in found.key_averages()}
    total = sum(times.values())
    largest = sorted(times, key=times.get, reverse=True)[:8]
    return {name[:90]: round(times[name] / total, 3) for name in largest}


if __name__ == "__main__":
    run_main(main)
