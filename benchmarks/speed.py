"""Speed and memory beside transformers and peft doing the same work, in the order A B A B.

    python benchmarks/speed.py                             # all cases, over half an hour on 2 cores
    python benchmarks/speed.py --cases train/4x512 explain/1 --out out/speed.json

Every measurement is a process of its own, so that its peak memory is its own. The peer: the same
rows, dtype and LoRA (rank 16 on all seven projections, by peft), transformers' SDPA attention. It
pads rows in the order of the file; we sort them by length. In training, its own loss by `labels`
(-100 outside the answers) and a linear score of the prompt's last hidden state, in one pass.
`merged` writes explanations too, without LoRA beside the weights, on either side.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from importlib.metadata import version
from pathlib import Path

import torch
import torch.nn.functional as F

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))
from clsgen import (  # noqa: E402
    TARGETS, CLSGen, Reading, add_lora, choose_token, joint_loss, total_loss)
from data import Example, collate, encode_rows, read_rows  # noqa: E402
from plumbing.checkpoint import base_fingerprint, load_llama  # noqa: E402
from plumbing.files import write_json  # noqa: E402
from plumbing.packed import pack  # noqa: E402
from plumbing.script import keep_freed_memory, pick_device, run_main  # noqa: E402
from prompts import Prompts  # noqa: E402
from run import Fitted, Run  # noqa: E402
from train import micro_batches  # noqa: E402

CASES = (  # those with a dash have no peer: one of the two losses, checkpointing, no p
    "start/load train/4x512 train/4x512-lm train/4x512-cls train/discharge train/clinifact"
    " train/1x2048-checkpointing train/1x4096-checkpointing train/1x8192-checkpointing explain/1"
    " probability/discharge probability/clinifact explain/8 explain/8-no_p explain/32 merged/1"
    " merged/8 merged/32").split()
FOR_GPU = ["train/4x2048", "train/8x4096-checkpointing"]
UNITS = {"probability": "rows/s", "start": "starts/s"}
NEW_TOKENS, MICRO = 48, 4


# --- the rows -------------------------------------------------------------------------------------
def real_rows(args, name, count):
    """(prompts, rows, examples); without explanations, as in CliniFact, any 60 tokens answer."""
    discharge = ROOT / "examples/discharge/train.jsonl"
    rows = read_rows(args.clinifact if name == "clinifact" else discharge)[:count]
    prompts = Prompts(args.model, "Is the claim true?", max_answer=NEW_TOKENS)
    examples = encode_rows(rows, prompts, refuse=False)
    for example in examples:
        example.answer = example.answer or list(range(1000, 1060))
    return prompts, rows, examples


def training_rows(args, what):
    """A step's rows as micro-batches, ours sorted by length; or rows of random tokens of a size."""
    if what[0].isdecimal():
        ids = torch.randint(10, 40000, tuple(map(int, what.split("x")))).tolist()
        return [[Example(i, x[:-112], x[-112:], i % 2, 0) for i, x in enumerate(ids)]]
    examples = real_rows(args, what, 32 if what == "discharge" else 16)[2]
    plain = [examples[i : i + MICRO] for i in range(0, len(examples), MICRO)]
    return micro_batches(examples, MICRO) if args.side == "ours" else plain


# --- one side of one case: what to time, and how much of it there is ------------------------------
def peer(args, kind, dtype, lora):
    import transformers
    from peft import LoraConfig, get_peft_model
    model = getattr(transformers, kind).from_pretrained(args.model, dtype=dtype)
    if lora:
        model = get_peft_model(model, LoraConfig(r=16, lora_alpha=32, target_modules=list(TARGETS)))
    return model.to(args.device)


def train(args, dtype, what, mode):
    micros, ours, more = training_rows(args, what), args.side == "ours", {}
    rows, answers = sum(map(len, micros)), sum(len(e.answer) for micro in micros for e in micro)
    tokens = sum(len(example) for micro in micros for example in micro)
    if mode == "cls":
        micros = [[Example(e.id, e.prompt, [], e.label, 0) for e in micro] for micro in micros]
    weights = {"bce": float(mode != "lm"), "lm": float(mode != "cls")}
    if ours:
        llama = load_llama(args.model, dtype, args.device)
        llama.checkpointing = mode == "checkpointing"
        model = CLSGen(add_lora(llama, 16, 32.0))
        trained = [p for p in model.parameters() if p.requires_grad]
        blocks = sum(p.numel() for p in llama.layers.parameters() if not p.requires_grad)
        if mode == "cls":  # answers are not computed
            blocks, answers = blocks * (1 - answers / tokens), 0
        more = {"flop": 4 * (blocks + answers / tokens * llama.embed_tokens.weight.numel())}
    else:
        model = peer(args, "AutoModelForCausalLM", dtype, lora=True)
        score = torch.nn.Linear(model.config.hidden_size, 1, bias=False, device=args.device)
        trained = [p for p in model.parameters() if p.requires_grad] + [score.weight]
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def loss_of(micro):
        batch = collate(micro, args.device)
        if ours:
            z, logits = model(batch)
            terms = joint_loss(z, batch.labels, logits, batch.targets, rows, answers)
            return total_loss(terms, weights)
        lengths = torch.tensor([[len(example)] for example in micro], device=args.device)
        mask = torch.arange(batch.input_ids.shape[1], device=args.device) < lengths
        labels = torch.full_like(batch.input_ids, -100)
        labels[batch.answer_rows, batch.answer_positions + 1] = batch.targets
        out = model(input_ids=batch.input_ids, attention_mask=mask.long(), labels=labels,
                    output_hidden_states=True)
        last = out.hidden_states[-1][torch.arange(len(micro)), batch.prompt_end]
        bce = F.binary_cross_entropy_with_logits(score(last.float())[:, 0], batch.labels)
        return (bce + out.loss) / len(micros)

    def step():
        for micro in micros:
            loss_of(micro).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, tokens, more


def predict(args, dtype, what, mode):
    explain, lora, more = what.isdecimal(), not args.case.startswith("merged"), {}
    prompts, rows, examples = real_rows(args, what, int(what) if explain else 32)
    count, size = len(rows) * (NEW_TOKENS if explain else 1), len(rows) if explain else 16
    if args.side == "ours":
        llama = load_llama(args.model, dtype, args.device)
        run = Run(CLSGen(add_lora(llama, 16, 32.0) if lora else llama).eval(), prompts, Fitted())
        numbers = sum(p.numel() for p in llama.parameters())
        more = {"bytes": numbers * dtype.itemsize} if what == "1" else {}
        pack(llama)
        if mode == "no_p":  # the label words' probability costs a pass of its own
            Reading.log_probability = lambda reading, ids: reading.h_P[:, 0]

        def never_stop(logits):  # both sides write the same number of tokens
            logits[:, prompts.stop_ids] = -torch.inf
            return choose_token(logits)

        return lambda: run.predict(rows, explain, size, choose=never_stop), count, more
    kind = "AutoModelForCausalLM" if explain else "AutoModelForSequenceClassification"
    model = peer(args, kind, dtype, lora).eval()
    model.config.pad_token_id = 0

    @torch.inference_mode()
    def work():
        for start in range(0, len(examples), size):
            batch = [torch.tensor(example.prompt) for example in examples[start : start + size]]
            pad = {"batch_first": True, "padding_side": "left" if explain else "right"}
            ids, mask = (torch.nn.utils.rnn.pad_sequence(side, **pad).to(args.device)
                         for side in (batch, [torch.ones_like(row) for row in batch]))
            if explain:
                model.generate(input_ids=ids, attention_mask=mask, pad_token_id=0, do_sample=False,
                               max_new_tokens=NEW_TOKENS, min_new_tokens=NEW_TOKENS)
            else:
                model(input_ids=ids, attention_mask=mask)

    return work, count, more


def start(args, dtype, what, mode):
    """From the command to a first logit, imports and loading included."""
    load = {"ours": "from plumbing.checkpoint import load_llama; from plumbing.packed import pack; "
                    "m = pack(load_llama(*it))",
            "theirs": "from transformers import AutoModelForSequenceClassification as a; "
                      "m = a.from_pretrained(it[0], dtype=it[1])"}
    code = (f"import torch; it = {str(args.model)!r}, {dtype}; {load[args.side]}"
            "; torch.inference_mode()(m)(torch.arange(99)[None])")
    return lambda: subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True), 1, {}


def timed(function, tries):
    seconds = []
    for _ in range(tries):
        begin = time.perf_counter()
        function()
        torch.cuda.synchronize() if torch.cuda.is_available() else None
        seconds.append(time.perf_counter() - begin)
    return seconds


def measure(args):
    """One side of one case, in this process -> JSON on stdout."""
    dtype, device = pick_device(args.dtype, args.device)
    args.device, (kind, what) = str(device), args.case.split("/")
    what, _, mode = what.partition("-")
    torch.manual_seed(0)
    if args.side == "ours":
        keep_freed_memory()
    make = {"train": train, "start": start}.get(kind, predict)
    work, count, more = make(args, dtype, what, mode)
    seconds = timed(work, 1 + args.repeats)[1:]  # the first is to warm up
    who = resource.RUSAGE_CHILDREN if kind == "start" else resource.RUSAGE_SELF
    cuda, memory = device.type == "cuda", resource.getrusage(who).ru_maxrss * 1024
    memory = torch.cuda.max_memory_allocated() if cuda else memory
    # What the hardware does at best: products of square matrices, reading memory
    a = torch.randn([2**14 if cuda else 2**12] * 2, device=device).to(dtype)
    b = torch.zeros(2**25, dtype=torch.int64, device=device)
    peaks = {"flop": 2 * len(a) ** 3 / min(timed(lambda: a @ a, 5)),
             "bytes": b.nbytes / min(timed(b.max, 10))}
    rate = count / statistics.median(seconds)
    shares = [value * rate / peaks[name] for name, value in more.items()]
    print(json.dumps({"rate": rate, "seconds": seconds, "peak_bytes": memory, "share": sum(shares),
                      "peaks": peaks, "dtype": str(dtype), "threads": torch.get_num_threads()}))


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, default=ROOT / "models" / "smollm2-135m", help="folder of the base")
    add("--cases", nargs="+", default=CASES, choices=CASES + FOR_GPU, metavar="CASE", help="which")
    add("--rounds", type=int, default=2, help="A B, so many times")
    add("--repeats", type=int, default=2, help="of the work in one process, after one to warm up")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--device", help="such as cpu or cuda")
    add("--clinifact", type=Path, help="CliniFact's rows; without, two cases less")
    add("--out", type=Path, help="JSON file")
    add("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    add("--case", help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.case:
        return measure(args)
    about = {"command": ["benchmarks/speed.py", *(argv or sys.argv[1:])], "cpus": os.cpu_count(),
             "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
             "processor": platform.processor() or platform.machine(),
             "base_sha256": base_fingerprint(args.model)}
    results = {}
    print(f"{'case':25}{'ours':>8}{'theirs':>8}{'ratio':>6}  {'unit':9} peak GiB     of the peak")
    for case in (case for case in args.cases if args.clinifact or "clinifact" not in case):
        found = {side: [] for side in (["ours"] if "-" in case else ["ours", "theirs"])}
        for side in [*found] * args.rounds:
            command = [sys.executable, __file__, "--side", side, "--case", case]
            for name in ("model", "dtype", "repeats", "device", "clinifact"):
                value = getattr(args, name)
                command += ["--" + name, str(value)] if value is not None else []
            done = subprocess.run(command, capture_output=True, text=True)
            if done.returncode:
                raise ValueError(f"{case}, {side}: {done.stderr.strip()[-300:]}")
            found[side].append(json.loads(done.stdout.splitlines()[-1]))
        middle = {key: [statistics.median(run[key] for run in runs) for runs in found.values()]
                  for key in ("rate", "peak_bytes", "share")}
        unit = UNITS.get(case.split("/")[0], "tokens/s")
        results[case] = {"unit": unit, **middle, "runs": found}
        rates = [*middle["rate"], middle["rate"][0] / middle["rate"][-1]][: 2 * len(found) - 1]
        print(f"{case:25}{''.join(f'{rate:8.2f}' for rate in rates):24} {unit:9}"
              f"{' / '.join(f'{peak / 2**30:.2f}' for peak in middle['peak_bytes']):13}"
              f"{f'{share:.0%}' if (share := middle['share'][0]) else ''}", flush=True)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.out, about | {"cases": results})


if __name__ == "__main__":  # run_main keeps freed memory, which is ours alone
    main() if "--side" in sys.argv else run_main(main)
