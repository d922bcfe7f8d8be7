"""Speed and memory next to transformers and peft at the same work, in the order A B A B.

    python benchmarks/speed.py                             # all cases, over half an hour on 2 cores
    python benchmarks/speed.py --cases train/4x512 explain/1 --out out/speed.json

Every measurement is a process of its own, so that its peak memory is its own. The rate is the
median of the runs; next to it stands the fastest run, which other work on the machine slows least.

The peer has the same rows, dtype and LoRA (rank 16 on all seven projections, by peft), and
transformers' SDPA attention. It pads rows in the order of the file; we sort them by length. In
training it has its own loss by `labels` (-100 outside the answers) and a linear score of the
prompt's last hidden state, in one pass. `merged` writes explanations like `explain`, but without
LoRA, on either side.
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

# KIND/WHAT or KIND/WHAT-MODE. The modes have no peer: lm and cls are one of the two losses,
# checkpointing recomputes activations, and no_p writes texts without the label words' probability
CASES = [
    "start/load",
    "train/4x512",
    "train/4x512-lm",
    "train/4x512-cls",
    "train/discharge",
    "train/clinifact",
    "train/1x2048-checkpointing",
    "train/1x4096-checkpointing",
    "train/1x8192-checkpointing",
    "explain/1",
    "probability/discharge",
    "probability/clinifact",
    "explain/8",
    "explain/8-no_p",
    "explain/32",
    "merged/1",
    "merged/8",
    "merged/32",
]
FOR_GPU = ["train/4x2048", "train/8x4096-checkpointing"]
UNITS = {"probability": "rows/s", "start": "starts/s"}  # of the others: tokens/s
NEW_TOKENS = 48  # of each explanation
MICRO = 4  # rows of one forward pass in training


def main(argv=None):
    args = parse(argv)
    if args.case:
        measure_side(args)
        return

    load = os.getloadavg()[0]
    if load > 0.5:
        print(f"warning: something else is running on this machine (load average {load:.1f}), "
              "which makes all rates too low")
    report = {
        "command": ["benchmarks/speed.py", *(argv or sys.argv[1:])],
        "cpus": os.cpu_count(),
        "load_average": load,
        "versions": {name: version(name) for name in ("torch", "transformers", "peft")},
        "processor": platform.processor() or platform.machine(),
        "base_sha256": base_fingerprint(args.model),
        "cases": {},
    }

    print(f"{'':27}{'median run':25}{'fastest run':25}")
    names = f"{'ours':>8} {'theirs':>8} {'ratio':>5}  "
    print(f"{'case':27}{names}{names}{'unit':9} {'peak GiB':12} of the peak")
    for case in args.cases:
        if "clinifact" in case and not args.clinifact:
            continue
        result = measure_case(case, args)
        report["cases"][case] = result
        print_line(case, result)
        if args.out:
            args.out.parent.mkdir(parents=True, exist_ok=True)
            write_json(args.out, report)


def measure_case(case, args):
    """Both sides of one case in turns: what each run gives, and its median over the runs."""
    runs = {"ours": []}
    if "-" not in case:
        runs["theirs"] = []
    for _ in range(args.rounds):
        for side in runs:
            runs[side].append(run_side(side, case, args))

    result = {"unit": UNITS.get(case.split("/")[0], "tokens/s")}
    for key in ("rate", "peak_bytes", "share"):
        result[key] = []
        for found in runs.values():
            result[key].append(statistics.median(run[key] for run in found))
    result["fastest"] = []
    for found in runs.values():
        result["fastest"].append(max(run["fastest"] for run in found))
    result["runs"] = runs
    return result


def run_side(side, case, args):
    """One side of one case in a process of its own: what `measure_side` prints there."""
    command = [sys.executable, __file__, "--side", side, "--case", case]
    for name in ("model", "dtype", "repeats", "device", "clinifact"):
        value = getattr(args, name)
        if value is not None:
            command += [f"--{name}", str(value)]
    done = subprocess.run(command, capture_output=True, text=True)
    if done.returncode:
        raise ValueError(f"{case}, {side}: {done.stderr.strip()[-300:]}")
    return json.loads(done.stdout.splitlines()[-1])


def print_line(case, result):
    shown = f"{case:27}"
    for rates in (result["rate"], result["fastest"]):
        ours, *others = rates
        line = f"{ours:8.2f}"
        for theirs in others:
            line += f" {theirs:8.2f} {ours / theirs:5.2f}"
        shown += f"{line:25}"

    peaks = " / ".join(f"{peak / 2**30:.2f}" for peak in result["peak_bytes"])
    shown += f"{result['unit']:9} {peaks:12}"
    share = result["share"][0]
    if share:
        shown += f" {share:.0%}"
    print(shown, flush=True)


# --- one side of one case, in this process --------------------------------------------------------
def measure_side(args):
    """Times the work of one side, and prints a line of JSON."""
    kind, what = args.case.split("/")
    dtype, device = pick_device(args.dtype, args.device, trains=kind == "train")
    args.device = str(device)
    what, _, mode = what.partition("-")
    torch.manual_seed(0)
    if args.side == "ours":
        keep_freed_memory()

    # the work: a function, how many units of output it makes, and what a unit costs
    if kind == "train":
        work, count, costs = train(args, dtype, what, mode)
    elif kind == "start":
        work, count, costs = start(args, dtype)
    elif args.side == "ours":
        work, count, costs = predict(args, dtype, what, mode)
    else:
        work, count, costs = peer_predict(args, dtype, what)

    first, *seconds = timed(work, 1 + args.repeats)  # the first one warms up

    if device.type == "cuda":
        peak_bytes = torch.cuda.max_memory_allocated()
    else:
        who = resource.RUSAGE_CHILDREN if kind == "start" else resource.RUSAGE_SELF
        peak_bytes = resource.getrusage(who).ru_maxrss * 1024

    # which share of what the hardware does at best
    peaks = hardware_peaks(device, dtype)
    rate = count / statistics.median(seconds)
    share = 0
    for name, cost in costs.items():
        share += cost * rate / peaks[name]

    print(json.dumps({
        "rate": rate,
        "fastest": count / min(seconds),
        "seconds": seconds,
        "peak_bytes": peak_bytes,
        "share": share,
        "peaks": peaks,
        "dtype": str(dtype),
        "threads": torch.get_num_threads(),
    }))


def timed(function, tries):
    """The seconds of each call."""
    seconds = []
    for _ in range(tries):
        begin = time.perf_counter()
        function()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - begin)
    return seconds


def hardware_peaks(device, dtype):
    """FLOP/s of the product of two square matrices, and bytes/s of reading memory."""
    size = 2**14 if device.type == "cuda" else 2**12
    matrix = torch.randn(size, size, device=device).to(dtype)
    numbers = torch.zeros(2**25, dtype=torch.int64, device=device)
    return {
        "flop": 2 * size**3 / min(timed(lambda: matrix @ matrix, 5)),
        "bytes": numbers.nbytes / min(timed(numbers.max, 10)),
    }


# --- the rows -------------------------------------------------------------------------------------
def real_rows(args, name, count):
    """(prompts, rows, examples) of a file's first rows.

    The answer of a row without an explanation, as in CliniFact, is any 60 tokens.
    """
    path = ROOT / "examples" / "discharge" / "train.jsonl"
    if name == "clinifact":
        path = args.clinifact
    rows = read_rows(path)[:count]
    prompts = Prompts(args.model, "Is the claim true?", max_answer=NEW_TOKENS)
    examples = encode_rows(rows, prompts, limit_answers=False)
    for example in examples:
        if not example.answer:
            example.answer = list(range(1000, 1060))
    return prompts, rows, examples


def random_examples(rows, length):
    """Rows of random tokens, of which the last 112 are the answer."""
    ids = torch.randint(10, 40000, (rows, length)).tolist()
    examples = []
    for i, row in enumerate(ids):
        examples.append(Example(i, row[:-112], row[-112:], label=i % 2, tokens_cut=0))
    return examples


def training_rows(args, what):
    """A step's rows as micro-batches, ours sorted by length. ROWSxTOKENS: one of random tokens."""
    if what[0].isdecimal():
        rows, length = what.split("x")
        return [random_examples(int(rows), int(length))]

    count = 32 if what == "discharge" else 16
    _, _, examples = real_rows(args, what, count)
    if args.side == "ours":
        return micro_batches(examples, MICRO)
    return [examples[i : i + MICRO] for i in range(0, len(examples), MICRO)]


# --- training: (a step, its tokens, {the least cost of a token}) ----------------------------------
def train(args, dtype, what, mode):
    micros = training_rows(args, what)
    rows = 0
    tokens = 0
    answer_tokens = 0
    for micro in micros:
        rows += len(micro)
        for example in micro:
            tokens += len(example)
            answer_tokens += len(example.answer)

    costs = {}
    if args.side == "ours":
        if mode == "cls":  # no answer is computed, but the rate counts their tokens
            for micro in micros:
                for example in micro:
                    example.answer = []
        model = our_trained_model(args, dtype, mode)
        trained = [p for p in model.parameters() if p.requires_grad]
        loss_of = our_loss(model, args, mode, rows, 0 if mode == "cls" else answer_tokens)
        costs["flop"] = flop_of_token(model.model, answer_tokens / tokens, mode)
    else:
        model = peer(args, "AutoModelForCausalLM", dtype, lora=True)
        score = torch.nn.Linear(model.config.hidden_size, 1, bias=False, device=args.device)
        trained = [p for p in model.parameters() if p.requires_grad]
        trained.append(score.weight)
        loss_of = peer_loss(model, score, args, len(micros))
    optimizer = torch.optim.AdamW(trained, lr=1e-4)

    def step():
        for micro in micros:
            loss_of(micro).backward()
        optimizer.step()
        optimizer.zero_grad()

    return step, tokens, costs


def our_trained_model(args, dtype, mode):
    llama = load_llama(args.model, dtype, args.device)
    llama.checkpointing = mode == "checkpointing"
    return CLSGen(add_lora(llama, rank=16, alpha=32.0))


def our_loss(model, args, mode, rows, answer_tokens):
    """A function of a micro-batch. rows, answer_tokens: of the whole step."""
    weights = {"bce": float(mode != "lm"), "lm": float(mode != "cls")}

    def loss_of(micro):
        batch = collate(micro, args.device)
        z, logits = model(batch)
        terms = joint_loss(z, batch.labels, logits, batch.targets, rows, answer_tokens)
        return total_loss(terms, weights)

    return loss_of


def flop_of_token(llama, answer_share, mode):
    """Of a token in training: 2 forward and 2 backward for each frozen weight that it meets."""
    weights = 0
    for parameter in llama.layers.parameters():
        if not parameter.requires_grad:
            weights += parameter.numel()
    if mode == "cls":
        return 4 * weights * (1 - answer_share)
    return 4 * (weights + answer_share * llama.embed_tokens.weight.numel())


def peer(args, kind, dtype, lora):
    """A model of transformers, with peft's LoRA."""
    import transformers
    from peft import LoraConfig, get_peft_model

    model = getattr(transformers, kind).from_pretrained(args.model, dtype=dtype)
    if lora:
        config = LoraConfig(r=16, lora_alpha=32, target_modules=list(TARGETS))
        model = get_peft_model(model, config)
    return model.to(args.device)


def peer_loss(model, score, args, micro_count):
    """A function of a micro-batch."""

    def loss_of(micro):
        batch = collate(micro, args.device)
        lengths = torch.tensor([[len(example)] for example in micro], device=args.device)
        mask = torch.arange(batch.input_ids.shape[1], device=args.device) < lengths
        labels = torch.full_like(batch.input_ids, -100)
        labels[batch.answer_rows, batch.answer_positions + 1] = batch.targets
        out = model(
            input_ids=batch.input_ids,
            attention_mask=mask.long(),
            labels=labels,
            output_hidden_states=True,
        )

        last_state = out.hidden_states[-1][torch.arange(len(micro)), batch.prompt_end]
        z = score(last_state.float())[:, 0]
        bce = F.binary_cross_entropy_with_logits(z, batch.labels)
        return (bce + out.loss) / micro_count

    return loss_of


# --- predictions: (a function, its tokens or rows, {the least cost of one}) -----------------------
def size_of_work(what):
    """(explains, rows, rows of a batch): WHAT is a number of texts to write, or the rows' name."""
    if what.isdecimal():
        return True, int(what), int(what)
    return False, 32, 16


def predict(args, dtype, what, mode):
    explains, count, batch_size = size_of_work(what)
    prompts, rows, _ = real_rows(args, what, count)

    llama = load_llama(args.model, dtype, args.device)
    if not args.case.startswith("merged"):
        add_lora(llama, rank=16, alpha=32.0)
    run = Run(CLSGen(llama).eval(), prompts, Fitted())
    costs = {}
    if what == "1":  # a token reads every weight once
        weights = sum(parameter.numel() for parameter in llama.parameters())
        costs["bytes"] = weights * dtype.itemsize
    pack(llama)
    if mode == "no_p":  # the label words' probability costs a pass of its own
        Reading.log_probability = lambda reading, ids: reading.h_P[:, 0]

    def never_stop(logits):  # both sides write the same number of tokens
        logits[:, prompts.stop_ids] = -torch.inf
        return choose_token(logits)

    def work():
        run.predict(rows, explain=explains, batch_size=batch_size, choose=never_stop)

    if explains:
        return work, len(rows) * NEW_TOKENS, costs
    return work, len(rows), costs


def peer_predict(args, dtype, what):
    explains, count, batch_size = size_of_work(what)
    _, rows, examples = real_rows(args, what, count)
    kind = "AutoModelForCausalLM" if explains else "AutoModelForSequenceClassification"
    lora = not args.case.startswith("merged")
    model = peer(args, kind, dtype, lora).eval()
    model.config.pad_token_id = 0

    def padded(rows):
        side = "left" if explains else "right"
        rows = torch.nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_side=side)
        return rows.to(args.device)

    @torch.inference_mode()
    def work():
        for first in range(0, len(examples), batch_size):
            batch = examples[first : first + batch_size]
            prompts = [torch.tensor(example.prompt) for example in batch]
            ids = padded(prompts)
            mask = padded([torch.ones_like(prompt) for prompt in prompts])
            if explains:
                model.generate(
                    input_ids=ids,
                    attention_mask=mask,
                    pad_token_id=0,
                    do_sample=False,
                    max_new_tokens=NEW_TOKENS,
                    min_new_tokens=NEW_TOKENS,
                )
            else:
                model(input_ids=ids, attention_mask=mask)

    if explains:
        return work, len(rows) * NEW_TOKENS, {}
    return work, len(rows), {}


# --- starting -------------------------------------------------------------------------------------
OUR_START = """
import torch
from plumbing.checkpoint import load_llama
from plumbing.packed import pack
model = pack(load_llama({model!r}, {dtype}))
"""
PEER_START = """
import torch
from transformers import AutoModelForSequenceClassification
model = AutoModelForSequenceClassification.from_pretrained({model!r}, dtype={dtype})
"""
FIRST_LOGIT = "torch.inference_mode()(model)(torch.arange(99)[None])\n"


def start(args, dtype):
    """From the command to a first logit, with imports and loading."""
    code = OUR_START if args.side == "ours" else PEER_START
    code = code.format(model=str(args.model), dtype=dtype) + FIRST_LOGIT

    def work():
        subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True)

    return work, 1, {}


# --- arguments ------------------------------------------------------------------------------------
def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("--model", type=Path, default=ROOT / "models" / "smollm2-135m", help="folder of the base")
    add("--cases", nargs="+", default=CASES, choices=CASES + FOR_GPU, metavar="CASE", help="which")
    add("--rounds", type=int, default=2, help="A B, so many times")
    add("--repeats", type=int, default=2, help="of the work in one process, after one to warm up")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    add("--device", help="such as cpu or cuda")
    add("--clinifact", type=Path, help="CliniFact's rows; its two cases need them")
    add("--out", type=Path, help="JSON file")
    add("--side", choices=["ours", "theirs"], help=argparse.SUPPRESS)
    add("--case", help=argparse.SUPPRESS)
    return parser.parse_args(argv)


if __name__ == "__main__":
    if "--side" in sys.argv:
        main()  # run_main would keep freed memory, and the peer does not
    else:
        run_main(main)
