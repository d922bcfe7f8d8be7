"""Joint training of CLSGen: LoRA and a score head on one Llama, both losses in every step.

    python train.py --data examples/discharge/train.jsonl --valid examples/discharge/valid.jsonl
    python train.py --resume runs/train                    # continues after the last saved step
    torchrun --nproc_per_node 8 train.py --data x.jsonl    # shares each step's rows out to 8 GPUs

The baselines are the same loop with one weight at zero: --lm-weight 0 is a plain classifier,
--cls-weight 0 plain generative fine-tuning. The run folder holds everything that a prediction needs
but the base weights; log.jsonl has a line for every step and every validation.
"""

import argparse
import copy
import json
import math
import os
import signal
import sys
import time
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from clsgen import TARGETS, CLSGen, add_lora, joint_loss, total_loss
from data import collate, encode_rows, read_rows, show, split_valid
from metrics import auroc, collapse, score_metrics, sigmoid
from plumbing.adapter import load_adapter, read_adapter_config
from plumbing.checkpoint import base_fingerprint, load_llama
from plumbing.files import sha256_of, write_atomically
from plumbing.ranks import Ranks
from plumbing.resume import STATE, read_state, restore, save_state
from plumbing.script import (dtype_name, pick_device, printable, refuse, run_main, stop_signals,
                             versions)
from plumbing.tables import table
from prompts import Prompts, add_prompt_arguments
from run import Fitted, Run, fit, save_run


# --- the whole training ---------------------------------------------------------------------------
def main(argv=None):
    args = parse(argv)
    check_arguments(args)
    torch.manual_seed(args.seed)
    ranks = Ranks()  # one process, or one of several that torchrun has started
    dtype, device = pick_device(args.dtype, args.device)
    ranks.connect(device)
    if args.batch < ranks.count:
        raise ValueError(f"--batch {args.batch} is below the number of processes, {ranks.count}")

    # rows as tokens; where the text does not train, its tokens need not be computed
    prompts = Prompts(args.model, args.question, args.labels, args.format, args.max_prompt,
                      args.max_answer)
    train_rows, valid_rows = load_rows(args)
    train = encode_rows(train_rows, prompts, answers=args.lm_weight > 0)
    valid = encode_rows(valid_rows, prompts)
    watched_rows = sorted(valid_rows, key=lambda row: "explanation" not in row)[:8]

    # the model: a frozen base, LoRA and a score head
    llama = load_llama(args.model, dtype, device)
    llama.checkpointing = args.checkpointing
    model = CLSGen(add_lora(llama, args.rank, args.alpha, args.targets))
    model.start_head(prompts.label_ids)
    if args.init_adapter and not args.resume:
        load_adapter(model, Path(args.init_adapter) / "adapter_model.safetensors", need_head=False)
    groups = model.parameter_groups()
    trained = groups["lora"] | groups["head"]
    optimizer = make_optimizer(groups, args)

    # which rows each step takes
    labels = [example.label for example in train]
    steps = max(1, round(args.epochs * len(train) / args.batch))
    epochs = math.ceil(steps * args.batch / len(train))
    order = np.concatenate([epoch_order(labels, args.seed, epoch) for epoch in range(epochs)])
    valid_every = args.valid_every or math.ceil(len(train) / args.batch)  # or: each epoch

    # a new run folder, or one to continue with
    config = configuration(args, prompts, steps, dtype, device, ranks)
    introduce(config, groups, train, valid, prompts)
    state = {"config": config, "step": 0, "tokens": 0, "seconds": 0.0}
    best = {}  # what is kept for the end
    if args.resume:
        state, best = restore(args.out, trained, optimizer, config)
        print(f"continues after step {state['step']} of {steps}")
    elif ranks.rank == 0:
        begin_run_folder(args.out, config)

    wrapped = ranks.wrap(model)
    log = TrainingLog(args.out, state, steps, silent=ranks.rank > 0)
    with log, stop_signals() as caught:
        for step in range(state["step"] + 1, steps + 1):
            # one optimizer step
            examples = [train[i] for i in order[(step - 1) * args.batch : step * args.batch]]
            rate = schedule(step - 1, steps, args.warmup)
            losses = train_step(wrapped, optimizer, examples, rate, args, device, ranks)
            sums = ranks.total({**losses, "stop": float(len(caught))}, device)
            stop = sums.pop("stop") > 0  # a signal that any of the processes has caught

            state["step"] = step
            state["tokens"] += sum(len(example) for example in examples)
            state["seconds"] = log.seconds()
            log.step(state, sums, rate * args.lr)

            # measure
            validates = step % valid_every == 0 or step == steps
            if validates:
                measured, z = validate(model, valid, device, 4 * args.micro_batch)
                measured.update(watch_text(model, prompts, watched_rows, 4 * args.micro_batch))
                if args.cls_weight == 0:  # the head does not train: no number of it says anything
                    measured.update({"bce": None, "auroc": None})
                log.validation(step, measured)

                if not best or not args.keep_best or measured["bce"] < state["best_bce"]:
                    state.update({"best_bce": measured["bce"], "best_step": step})
                    best = {"z": torch.tensor(z)}
                    if args.keep_best:
                        best.update(copies(trained))

            # save: a crash costs the steps since the last time, no more
            if ranks.rank == 0 and (validates or stop or step % args.save_every == 0):
                save_state(args.out, trained, optimizer, state, best)
            if stop:
                print(f"stopped after step {step}; --resume {args.out} continues", file=sys.stderr)
                sys.exit(128 + (caught or [signal.SIGTERM])[0])

    ranks.leave()
    if ranks.rank == 0:
        for name, parameter in trained.items():
            parameter.data.copy_(best.get(name, parameter))
        base_rate = float(np.mean(labels))
        finish(args, model.eval(), prompts, valid_rows, best["z"].numpy(), base_rate, state)


# --- one step -------------------------------------------------------------------------------------
def train_step(model, optimizer, examples, rate, args, device, ranks):
    """One optimizer step over `examples` -> this rank's part of each loss term, {name: number}.

    The terms are means over the whole step: all micro-batches of all ranks. `rate` is the share of
    the peak learning rates. ValueError for a loss or a gradient that is not finite, before any
    parameter changes.
    """
    weights = {"bce": args.cls_weight, "lm": args.lm_weight}
    n_examples = len(examples)
    n_tokens = sum(len(example.answer) for example in examples)
    losses = {}

    mine = examples[ranks.rank :: ranks.count]
    micros = micro_batches(mine, args.micro_batch)
    for micro in micros:
        batch = collate(micro, device)
        is_last = micro is micros[-1]
        with nullcontext() if is_last or ranks.count == 1 else model.no_sync():
            z, logits = model(batch)
            terms = joint_loss(z, batch.labels, logits, batch.targets, n_examples, n_tokens)
            loss = total_loss(terms, weights)
            if not loss.isfinite():
                ids = [example.id for example in micro]
                raise ValueError(f"the loss is {loss.item()}; rows: {ids}")
            (ranks.count * loss).backward()  # DistributedDataParallel takes the mean over ranks
        for name, term in terms.items():
            losses[name] = losses.get(name, 0.0) + term.item()

    for group in optimizer.param_groups:
        group["lr"] = rate * group["peak"]
        # LoRA and head apart: the head's gradient is long, since all hidden states share one long
        # mean, and would shrink LoRA's at random
        norm = torch.nn.utils.clip_grad_norm_(group["params"], args.clip)
        if not math.isfinite(norm):
            ids = [example.id for example in examples]
            raise ValueError(f"the gradient is not finite; rows of this step: {ids}")
    optimizer.step()
    optimizer.zero_grad()
    return losses


def micro_batches(examples, size):
    """The rows of a step in parts of `size`, sorted by length so that each part pads little."""
    examples = sorted(examples, key=len)
    return [examples[i : i + size] for i in range(0, len(examples), size)]


def epoch_order(labels, seed, epoch):
    """A random order of the rows in which every stretch has the file's share of each class.

    Random, never sorted by length: the classes' explanations differ in length, so that sorted steps
    are nearly of one class. And stratified, since a step's class balance moves all logits together,
    a noise that hides what tells rows apart; the expected gradient is the same.

    labels (N,) -> indices (N,).
    """
    rng = np.random.default_rng([seed, epoch])
    labels = np.array(labels)
    place = np.empty(len(labels))  # of each row, from 0 to 1
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        place[rows] = (np.arange(len(rows)) + rng.random()) / len(rows)
    return np.argsort(place)


def schedule(step, steps, warmup):
    """Share of the peak learning rate: linear warm-up, then linear decay to zero.

    Zero would be reached right after the last step.
    """
    rising = max(1, round(warmup * steps))
    falling = max(1, steps - rising + 1)
    return min((step + 1) / rising, (steps - step) / falling)


def make_optimizer(groups, args):
    """AdamW over LoRA and, unless its loss has no weight, the head; each with its own peak rate."""
    parameter_groups = [{"params": list(groups["lora"].values()), "peak": args.lr}]
    if args.cls_weight > 0:
        parameter_groups.append({"params": list(groups["head"].values()), "peak": args.head_lr})
    return torch.optim.AdamW(parameter_groups, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)


def copies(parameters):
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


# --- validation -----------------------------------------------------------------------------------
@torch.inference_mode()
def validate(model, examples, device, size):
    """(the loss terms and AUROC by name, raw logits (N,)) of all rows. Nothing is fitted here."""
    n_tokens = sum(len(example.answer) for example in examples)
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    measured = {}
    raw_z = np.zeros(len(examples))
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        batch = collate([examples[i] for i in indices], device)
        z, logits = model(batch)
        terms = joint_loss(z, batch.labels, logits, batch.targets, len(examples), n_tokens)
        for name, term in terms.items():
            measured[name] = measured.get(name, 0.0) + term.item()
        raw_z[indices] = z.cpu()

    if n_tokens == 0:
        measured["lm"] = None
    measured["auroc"] = auroc([example.label for example in examples], sigmoid(raw_z))
    return measured, raw_z


def watch_text(model, prompts, rows, size):
    """The collapse meter: what a few rows' texts are like by now, 64 tokens of each at most."""
    prompts = copy.copy(prompts)
    prompts.max_answer = min(64, prompts.max_answer)
    run = Run(model, prompts, Fitted(scorer="label_token"))
    return collapse(run.predict(rows, batch_size=size), run.reference_sums(rows, size))


# --- rows and run folder --------------------------------------------------------------------------
def load_rows(args):
    """(training, validation) rows, validation thinned to --valid-rows by the seed."""
    train = read_rows(args.data)
    if args.valid:
        valid = read_rows(args.valid)
        train_groups = {row["group"] for row in train if "group" in row}
        valid_groups = {row["group"] for row in valid if "group" in row}
        shared = train_groups & valid_groups
        if shared:
            print(f"warning: {len(shared)} groups stand in both {args.data} and {args.valid}")
    else:
        train, valid = split_valid(train, args.valid_fraction, args.seed)

    if len(valid) > args.valid_rows:
        shuffled = np.random.default_rng(args.seed).permutation(len(valid))
        valid = [valid[i] for i in sorted(shuffled[: args.valid_rows])]
        if len({row["label"] for row in valid}) < 2:
            raise ValueError(f"--valid-rows {args.valid_rows} leaves one class only for validation")

    unexplained = [row["id"] for row in train if "explanation" not in row]
    if args.cls_weight == 0 and unexplained:
        raise ValueError(f"--cls-weight 0 trains on explanations only; {len(unexplained)} rows "
                         f"have none, the first is {unexplained[0]!r}")
    return train, valid


def configuration(args, prompts, steps, dtype, device, ranks):
    """Everything that decides the result, for the log and for --resume, which compares it."""
    config = {}
    for name, value in vars(args).items():
        if name not in ("out", "overwrite", "resume"):
            config[name] = str(value) if isinstance(value, Path) else value
    config.update({
        "device": device.type,
        "dtype": dtype_name(dtype),
        "steps": steps,
        "format": prompts.format,
        "ranks": ranks.count,
        "threads": torch.get_num_threads(),
        "base_sha256": base_fingerprint(args.model),
        "versions": versions(),
    })
    for path in (args.data, args.valid):
        if path:
            config[f"sha256 of {path}"] = sha256_of(path)
    return config


def introduce(config, groups, train, valid, prompts):
    """The first screen: configuration, what trains, how much data, one row as the model sees it."""
    for key, value in config.items():
        if isinstance(value, list):
            value = " ".join(str(part) for part in value)
        print(f"{key:15} {value}")
    for name, parameters in groups.items():
        print(f"{name:7} {sum(p.numel() for p in parameters.values()):>12,} parameters")

    tokens = sum(len(example) for example in train)
    cut = sum(example.tokens_cut > 0 for example in train)
    unexplained = sum(not example.answer for example in train)
    print(f"train   {len(train):>12,} rows, {tokens:,} tokens an epoch, {cut} texts cut; "
          f"{unexplained} rows train the score head only")
    print(f"valid   {len(valid):>12,} rows\n\n{show(train[0], prompts)}\n", flush=True)


def begin_run_folder(folder, config):
    """An empty log in the folder, and nothing that looks like a finished or a stopped run."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("clsgen.json", STATE):
        (folder / name).unlink(missing_ok=True)
    write_atomically(folder / "log.jsonl", json.dumps({"config": config}) + "\n")


class TrainingLog:
    """log.jsonl and the progress bar: a line for each step, and one for each validation."""

    def __init__(self, folder, state, steps, silent):
        self.file = open(os.devnull if silent else folder / "log.jsonl", "a")
        self.bar = tqdm(total=steps, initial=state["step"], desc="train", disable=silent)
        self.start = time.perf_counter() - state["seconds"]

    def seconds(self):
        """How long this training has taken so far, in all its parts."""
        return round(time.perf_counter() - self.start, 2)

    def step(self, state, losses, learning_rate):
        line = {"step": state["step"], **losses, "lr": learning_rate,
                "tokens": state["tokens"], "seconds": state["seconds"]}
        print(json.dumps(line), file=self.file, flush=True)

        shown = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        speed = state["tokens"] / max(state["seconds"], 0.01)
        self.bar.set_postfix_str(f"{shown} {speed:.0f} tok/s", refresh=False)
        self.bar.update()

    def validation(self, step, measured):
        print(json.dumps({"step": step, "valid": measured}), file=self.file, flush=True)

        shown = []
        for name in ("bce", "lm", "auroc", "base_kl"):
            if measured.get(name) is not None:
                shown.append(f"{name} {measured[name]:.4f}")
        self.bar.write(f"step {step}: validation {'  '.join(shown)}")

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.bar.close()
        self.file.close()


def finish(args, model, prompts, rows, z, base_rate, state):
    """Calibration and threshold on the validation rows, the run folder, a table, three rows."""
    y = np.array([row["label"] for row in rows])
    scorer = "head"
    if args.cls_weight == 0:  # the head never trained: the label token is the score
        scorer = "label_token"
        z = Run(model, prompts, Fitted(scorer)).raw_logits(rows)
    fitted, sentence = fit(scorer, y, z, base_rate)
    print(sentence)

    run = Run(model, prompts, fitted, str(args.out))
    save_run(run, args.out, {
        "base": str(args.model),
        "base_fingerprint": base_fingerprint(args.model),
        "lora": {"rank": args.rank, "alpha": args.alpha, "targets": list(args.targets)},
        "step": state["best_step"],
    })

    p = sigmoid(z / fitted.temperature + fitted.bias)
    columns = {"calibrated": score_metrics(y, p, p >= fitted.threshold),
               "raw": score_metrics(y, sigmoid(z))}
    print(f"\n{len(y)} validation rows, the ones that calibration and threshold were fitted on:\n")
    print(table(columns, ("auroc", "f1", "log_loss", "ece", "ece_floor")))

    first_middle_last = [rows[0], rows[len(rows) // 2], rows[-1]]
    for record in run.predict(first_middle_last):
        stated = "nothing"
        if record["stated_label"] is not None:
            stated = prompts.labels[record["stated_label"]]
        print(f"\nrow {record['id']!r}: probability {record['probability']:.3f}, label "
              f"{prompts.labels[record['true_label']]}; the text states {stated}:\n"
              f"  {printable(record['explanation'])}")
    print(f"\nrun folder: {args.out}")


# --- arguments ------------------------------------------------------------------------------------
def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0],
                                     formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    add = parser.add_argument
    # data
    add("--data", type=Path, help="training rows, JSON Lines")
    add("--valid", type=Path, help="validation rows, JSON Lines")
    add("--valid-fraction", type=float, default=0.1, help="without --valid: this share of --data")
    add("--valid-rows", type=int, default=500, help="validate on at most this many rows")
    add_prompt_arguments(parser)
    # model
    add("--model", default="models/smollm2-135m", help="Hugging Face folder of the base model")
    add("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"],
        help="of the base; auto: bfloat16, on a CPU if it multiplies it")
    add("--device", help="cpu, cuda, ... (default: cuda where there is one)")
    add("--rank", type=int, default=16, help="of LoRA")
    add("--alpha", type=float, default=32.0, help="LoRA's product is scaled by alpha / rank")
    add("--targets", nargs="+", default=list(TARGETS), choices=TARGETS, metavar="PROJ",
        help="projections that LoRA wraps")
    add("--init-adapter", help="start from a LoRA adapter of peft: with its rank, alpha, targets")
    add("--checkpointing", action="store_true", help="recompute activations: less memory, slower")
    # loss
    add("--cls-weight", type=float, default=1.0, help="of the score head's BCE")
    add("--lm-weight", type=float, default=1.0, help="of the explanations' cross-entropy")
    # steps
    add("--epochs", type=float, default=3.0, help="passes over the training rows")
    add("--batch", type=int, default=16, help="rows of one optimizer step")
    add("--micro-batch", type=int, default=4, help="rows of one forward pass")
    add("--lr", type=float, default=1e-3, help="peak learning rate of LoRA")
    add("--head-lr", type=float, default=2e-4, help="peak learning rate of the score head")
    add("--warmup", type=float, default=0.05, help="share of the steps; then linear decay to zero")
    add("--clip", type=float, default=1.0, help="gradient norm, of LoRA and of the head")
    add("--seed", type=int, default=0, help="of initial values, order and validation split")
    # run folder
    add("--out", type=Path, help="run folder (default: runs/ and the name of --data)")
    add("--overwrite", action="store_true", help="replace the run in --out, from the first step on")
    add("--valid-every", type=int, help="validate every so many steps (default: each epoch)")
    add("--keep-best", action="store_true", help="keep the step of lowest validation BCE")
    add("--save-every", type=int, default=50, help="save every so many steps; validations save too")
    add("--resume", type=Path, metavar="RUN", help="continue this run with the flags it had")

    args = parser.parse_args(argv)
    if args.resume:
        state, _ = read_state(args.resume)
        saved = {name: state["config"][name] for name in vars(args) if name in state["config"]}
        parser.set_defaults(**saved)
        args = parser.parse_args(argv)  # `restore` refuses a flag that is not what it was
        args.out = args.resume
    elif args.data is None:
        raise ValueError("--data is missing (or --resume)")
    elif args.init_adapter:
        take_over_adapter(args, parser)
    if args.out is None:
        args.out = Path("runs") / args.data.stem
    return args


def take_over_adapter(args, parser):
    """Sets rank, alpha and targets to the adapter's. ValueError for a flag that contradicts it."""
    args.targets = [name for name in TARGETS if name in args.targets]
    for name, value in read_adapter_config(args.init_adapter).items():
        given = getattr(args, name)
        if given not in (parser.get_default(name), value):
            raise ValueError(f"--{name} {given}: {args.init_adapter} has {value}")
        setattr(args, name, value)


def check_arguments(args):
    """ValueError that names all impossible flags at once."""
    problems = []

    def check(fits, name, expected):
        if not fits:
            value = getattr(args, name)
            problems.append(f"--{name.replace('_', '-')} is {value}, expected {expected}")

    for name in ("rank", "batch", "micro_batch", "valid_rows", "max_prompt", "max_answer",
                 "save_every"):
        check(getattr(args, name) >= 1, name, "1 or more")
    for name in ("seed", "cls_weight", "lm_weight"):
        check(getattr(args, name) >= 0, name, "0 or more")
    for name in ("alpha", "epochs", "lr", "head_lr", "clip"):
        check(0 < getattr(args, name) < math.inf, name, "a number above 0")
    check(0 <= args.warmup <= 1, "warmup", "a share of the steps, from 0 to 1")
    check(0 < args.valid_fraction < 1, "valid_fraction", "a share of the rows, between 0 and 1")
    check(args.valid_every is None or args.valid_every >= 1, "valid_every", "1 or more")

    if args.cls_weight == args.lm_weight == 0:
        problems.append("--cls-weight and --lm-weight are both 0: nothing would train")
    if args.keep_best and args.cls_weight == 0:
        problems.append("--keep-best goes by the BCE, which --cls-weight 0 does not train")

    if not args.overwrite and not args.resume:
        if (args.out / "clsgen.json").exists():
            problems.append(f"{args.out} has a run already; give another --out or --overwrite")
        elif (args.out / STATE).exists():
            problems.append(f"{args.out} has a stopped run; "
                            f"give --resume {args.out} or --overwrite")
    refuse(problems)


if __name__ == "__main__":
    run_main(main)
