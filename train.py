"""Joint training of CLSGen: LoRA and a score head on one Llama, both losses in every step.

    python train.py --data examples/discharge/train.jsonl --valid examples/discharge/valid.jsonl
    python train.py --resume runs/train                    # goes on after the last saved step
    torchrun --nproc_per_node 8 train.py --data x.jsonl    # shares each step's rows out to 8 GPUs

The baselines are the same loop with one weight at zero: --lm-weight 0 is a plain classifier,
--cls-weight 0 plain generative fine-tuning. The run folder holds all that a prediction needs but
the base weights; log.jsonl has a line for every step and every validation.
"""

import argparse
import copy
import hashlib
import json
import math
import os
import signal
import sys
import time
from contextlib import contextmanager, nullcontext
from pathlib import Path

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from torch import distributed as dist
from torch.nn.parallel import DistributedDataParallel
from tqdm import tqdm

from clsgen import TARGETS, CLSGen, Run, add_lora, base_fingerprint, joint_loss, load_adapter
from clsgen import pick, read_adapter_config, run_main, versions, write_atomically, write_tensors
from data import DataError, Prompts, add_prompt_arguments, collate, encode_rows, printable
from data import read_rows, show, split_valid
from eval import UNFITTED, auroc, calibrate, collapse, raw_logits, reference_sums, score_metrics
from eval import sigmoid, table
from model import load_llama

STATE = Path("resume") / "state.safetensors"  # in the run folder: what --resume goes on from


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
    add("--resume", type=Path, metavar="RUN", help="go on with this run and the flags it had")
    args = parser.parse_args(argv)
    if args.resume:
        saved = read_state(args.resume)[0]["config"]
        parser.set_defaults(**{name: saved[name] for name in vars(args).keys() & saved.keys()})
        args = parser.parse_args(argv)  # `restore` refuses a flag that is not what it was
        args.out = args.resume
    elif args.data is None:
        raise ValueError("--data is missing (or --resume)")
    elif args.init_adapter:
        args.targets = [name for name in TARGETS if name in args.targets]
        for name, value in read_adapter_config(args.init_adapter).items():
            if getattr(args, name) not in (parser.get_default(name), value):
                raise ValueError(f"--{name} {getattr(args, name)}: {args.init_adapter} has {value}")
            setattr(args, name, value)
    args.out = args.out or Path("runs") / args.data.stem
    return args


def check_arguments(args):
    """All impossible flags in one ValueError."""
    wrong = [f"--{name.replace('_', '-')} {getattr(args, name)} is below {low}" for name, low in (
        ("rank", 1), ("batch", 1), ("micro_batch", 1), ("valid_rows", 1), ("max_prompt", 1),
        ("max_answer", 1), ("seed", 0), ("cls_weight", 0), ("lm_weight", 0), ("warmup", 0),
        ("save_every", 1)) if not getattr(args, name) >= low]
    wrong += [f"--{name.replace('_', '-')} {getattr(args, name)} is no number above 0" for name in (
        "alpha", "epochs", "lr", "head_lr", "clip") if not 0 < getattr(args, name) < math.inf]
    if args.warmup > 1:
        wrong.append(f"--warmup {args.warmup} is over 1, all of the steps")
    if args.valid_every is not None and args.valid_every < 1:
        wrong.append(f"--valid-every {args.valid_every} is below 1")
    if args.keep_best and not args.cls_weight:
        wrong.append("--keep-best goes by BCE, which --cls-weight 0 does not train")
    if args.cls_weight == args.lm_weight == 0:
        wrong.append("--cls-weight and --lm-weight are both 0: nothing would train")
    if not 0 < args.valid_fraction < 1:
        wrong.append(f"--valid-fraction {args.valid_fraction} is not between 0 and 1")
    if not args.overwrite and not args.resume:
        if (args.out / "clsgen.json").exists():
            wrong.append(f"{args.out} has a run already; give another --out or --overwrite")
        elif (args.out / STATE).exists():
            wrong.append(f"{args.out} has a stopped run; give --resume {args.out} or --overwrite")
    if wrong:
        raise ValueError("; ".join(wrong))


# --- data and schedule ----------------------------------------------------------------------------
def load_data(args):
    """(training, validation) rows, validation thinned to --valid-rows by the seed."""
    rows = read_rows(args.data)
    if args.valid:
        valid = read_rows(args.valid)
        groups = [{row["group"] for row in side if "group" in row} for side in (rows, valid)]
        if shared := groups[0] & groups[1]:
            print(f"warning: {len(shared)} groups stand in both {args.data} and {args.valid}")
    else:
        rows, valid = split_valid(rows, args.valid_fraction, args.seed)
    if len(valid) > args.valid_rows:
        keep = np.random.default_rng(args.seed).permutation(len(valid))[: args.valid_rows]
        valid = [valid[i] for i in sorted(keep)]
        if len({row["label"] for row in valid}) < 2:
            raise DataError(f"--valid-rows {args.valid_rows} leaves one class only for validation")
    lone = [row["id"] for row in rows if "explanation" not in row]
    if not args.cls_weight and lone:
        raise DataError(f"--cls-weight 0 trains on explanations only; {len(lone)} rows have none, "
                        f"the first is {lone[0]!r}")
    return rows, valid


def epoch_order(labels, seed, epoch):
    """A random order of the rows in which every stretch has the file's share of each class.

    Random, never sorted by length: the classes' explanations differ in length, so that sorted steps
    are nearly of one class. And stratified, since a step's class balance moves all logits together,
    a noise that hides what tells rows apart; the expected gradient is the same.
    """
    rng, labels = np.random.default_rng([seed, epoch]), np.array(labels)
    place = np.empty(len(labels))
    for label in (0, 1):
        rows = rng.permutation(np.flatnonzero(labels == label))
        place[rows] = (np.arange(len(rows)) + rng.random()) / max(len(rows), 1)
    return np.argsort(place)


def micro_batches(examples, size):
    """Sorted by length inside the step, so that each forward pass pads little."""
    examples = sorted(examples, key=len)
    return [examples[i : i + size] for i in range(0, len(examples), size)]


def schedule(step, steps, warmup):
    """Share of the peak learning rate: linear warm-up, then linear decay to zero right after
    the last step."""
    rising = max(1, round(warmup * steps))
    return min((step + 1) / rising, (steps - step) / max(1, steps - rising + 1))


# --- validation -----------------------------------------------------------------------------------
@torch.inference_mode()
def validate(model, examples, device, size):
    """({"bce", "lm", "auroc"} over all rows, raw logits (N,)): measured, nothing is fitted here."""
    order, z = sorted(range(len(examples)), key=lambda i: len(examples[i])), np.zeros(len(examples))
    n_tokens = sum(len(example.answer) for example in examples)
    bce = lm = 0.0
    for start in range(0, len(order), size):
        indices = order[start : start + size]
        batch = collate([examples[i] for i in indices], device)
        logit, logits = model(batch)
        _, *parts = joint_loss(logit, batch.labels, logits, batch.targets, len(examples), n_tokens,
                               1.0, 1.0)
        bce, lm = bce + parts[0].item(), lm + parts[1].item()
        z[indices] = logit.cpu()
    y = [example.label for example in examples]
    return {"bce": bce, "lm": lm if n_tokens else None, "auroc": auroc(y, sigmoid(z))}, z


def watch_text(model, prompts, rows, size):
    """The collapse meter: what a few rows' texts are like by now, 64 tokens of each at most."""
    prompts = copy.copy(prompts)
    prompts.max_answer = min(64, prompts.max_answer)
    run = Run(model, prompts, UNFITTED)
    return collapse(run.predict(rows, batch_size=size), reference_sums(run, rows, size))


# --- training -------------------------------------------------------------------------------------
def train_step(model, optimizer, examples, args, share, device, rank=0, ranks=1):
    """One optimizer step over `examples` in micro-batches -> this rank's part of (BCE, LM loss),
    means over the whole step. ValueError for a loss or a gradient that is not finite, before any
    parameter changes."""
    n_tokens = sum(len(example.answer) for example in examples)
    bce, lm, micros = 0.0, 0.0, micro_batches(examples[rank::ranks], args.micro_batch)
    for micro in micros:
        batch, wait = collate(micro, device), ranks > 1 and micro is not micros[-1]
        with model.no_sync() if wait else nullcontext():  # ranks add their gradients once a step
            z, logits = model(batch)
            loss, *parts = joint_loss(z, batch.labels, logits, batch.targets, len(examples),
                                      n_tokens, args.cls_weight, args.lm_weight)
            if not loss.isfinite():
                raise ValueError(f"the loss is {loss.item()}; rows: {[e.id for e in micro]}")
            (ranks * loss).backward()  # DistributedDataParallel takes the mean over the ranks
        bce, lm = bce + parts[0].item(), lm + parts[1].item()
    for group in optimizer.param_groups:
        group["lr"] = share * group["peak"]
        # LoRA and head apart: the head's gradient is long, since all hidden states share one long
        # mean, and would shrink LoRA's at random
        norm = torch.nn.utils.clip_grad_norm_(group["params"], args.clip)
        if not math.isfinite(norm):
            ids = [example.id for example in examples]
            raise ValueError(f"the gradient is not finite; rows of this step: {ids}")
    optimizer.step()
    optimizer.zero_grad()
    return bce, lm


def total(values, device):
    """The sums of some numbers over all ranks."""
    if not dist.is_initialized():
        return values
    values = torch.tensor(values, dtype=torch.float64, device=device)
    dist.all_reduce(values)
    return values.tolist()


@contextmanager
def stop_signals():
    """A list that Ctrl-C or SIGTERM goes into, so that a step can end; the second acts at once."""
    caught, before = [], {}

    def note(number, frame):
        caught.append(number)
        signal.signal(number, before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# --- save and resume ------------------------------------------------------------------------------
def state_digest(text, tensors):
    """SHA-256 of the state's JSON and of every tensor: tells a damaged save."""
    digest = hashlib.sha256(text.encode())
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}".encode())
        digest.update(tensor.detach().cpu().numpy().data)
    return digest.hexdigest()


# Order and initial values follow from the seed and nothing else is random: weights, AdamW's moments
# and the step's number are the whole state. It is one file, so that it is never half new.
def save_state(folder, trained, optimizer, state, best):
    """trained {name: parameter}; `best`: the tensors that are kept at the end."""
    tensors = {"best." + name: tensor for name, tensor in best.items()}
    for name, parameter in trained.items():
        tensors["weight." + name] = parameter
        for key, value in optimizer.state.get(parameter, {}).items():
            tensors[f"{key}.{name}"] = value
    (folder / STATE).parent.mkdir(exist_ok=True)
    text = json.dumps(state)
    write_tensors(folder / STATE, tensors, {"state": text, "sha256": state_digest(text, tensors)})


def read_state(folder):
    """(state, tensors) as saved; ValueError where there is none."""
    try:
        with safe_open(folder / STATE, "pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}
            metadata = file.metadata()
        if metadata["sha256"] != state_digest(metadata["state"], tensors):
            raise ValueError("it is damaged")
        return json.loads(metadata["state"]), tensors
    except (SafetensorError, OSError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{folder / STATE}: nothing to resume from ({error})") from None


def restore(folder, trained, optimizer, config):
    """Puts the saved tensors back -> (state, best), and cuts log.jsonl back to that step.
    ValueError when flags, data, base model or number of ranks are not what they were."""
    state, tensors = read_state(folder)
    changed = {name: f"{name} was {state['config'].get(name)}, is {value}"
               for name, value in config.items() if state["config"].get(name) != value}
    for name in changed.keys() & {"versions", "threads"}:
        print(f"warning: {changed.pop(name)}: the result may differ in the last bits")
    if changed:
        raise ValueError(f"--resume {folder}: {'; '.join(changed.values())}")
    try:
        for name, parameter in trained.items():
            parameter.data.copy_(tensors["weight." + name])
            if "step." + name in tensors:
                optimizer.state[parameter] = {"step": tensors["step." + name]} | {
                    key: tensors[f"{key}.{name}"].to(parameter.device)
                    for key in ("exp_avg", "exp_avg_sq")}
        lines = (folder / "log.jsonl").read_bytes().splitlines(keepends=True)
        whole = [line for line in lines if line.endswith(b"\n")]
        kept = [line for line in whole if json.loads(line).get("step", 0) <= state["step"]]
    except (KeyError, TypeError, AttributeError, RuntimeError, ValueError) as error:
        raise ValueError(f"{folder}: {STATE} or log.jsonl does not fit: {error!r}") from None
    write_atomically(folder / "log.jsonl", b"".join(kept))
    best = {name.removeprefix("best."): tensor for name, tensor in tensors.items()
            if name.startswith("best.")}
    return state, best


def introduce(config, groups, train, valid, prompts):
    """The first screen: configuration, what trains, how much data, one row as the model sees it."""
    for key, value in config.items():
        print(f"{key:15} {' '.join(map(str, value)) if isinstance(value, list) else value}")
    for name, parameters in groups.items():
        print(f"{name:7} {sum(p.numel() for p in parameters.values()):>12,} parameters")
    tokens, cut = sum(map(len, train)), sum(example.tokens_cut > 0 for example in train)
    print(f"train   {len(train):>12,} rows, {tokens:,} tokens an epoch, {cut} texts cut; "
          f"{sum(not example.answer for example in train)} rows train the score head only")
    print(f"valid   {len(valid):>12,} rows\n\n{show(train[0], prompts)}\n", flush=True)


def finish(args, model, prompts, rows, z, meta):
    """Calibration and threshold on the validation rows, the run folder, a table, three rows."""
    y = np.array([row["label"] for row in rows])
    meta |= {
        "base": str(args.model), "base_fingerprint": base_fingerprint(args.model),
        "prompts": prompts.settings(), "scorer": "head" if args.cls_weight else "label_token",
        "lora": {"rank": args.rank, "alpha": args.alpha, "targets": list(args.targets)},
        "calibration": {"temperature": 1.0, "bias": 0.0}, "threshold": 0.5,
    }
    run = Run(model, prompts, meta, str(args.out))
    if not args.cls_weight:  # the score head never trained: the label token is the score
        z = raw_logits(run, rows)
    fitted, p, sentence = calibrate(y, z)
    print(sentence)
    meta |= fitted
    run.save(args.out)
    columns = {"calibrated": score_metrics(y, p, p >= meta["threshold"]),
               "raw": score_metrics(y, sigmoid(z))}
    print(f"\n{len(y)} validation rows, the ones that calibration and threshold were fitted on:\n")
    print(table(columns, ("auroc", "f1", "log_loss", "ece", "ece_floor")))
    for record in run.predict([rows[i] for i in (0, len(rows) // 2, len(rows) - 1)]):
        stated = {None: "nothing", **dict(enumerate(prompts.labels))}[record["stated_label"]]
        print(f"\nrow {record['id']!r}: probability {record['probability']:.3f}, label "
              f"{prompts.labels[record['true_label']]}; the text states {stated}:\n"
              f"  {printable(record['explanation'])}")
    print(f"\nrun folder: {args.out}")


def main(argv=None):
    args = parse(argv)
    check_arguments(args)
    torch.manual_seed(args.seed)
    # torchrun starts one process a GPU and says which is which
    rank, ranks = int(os.environ.get("RANK", 0)), int(os.environ.get("WORLD_SIZE", 1))
    if ranks > 1 and torch.cuda.is_available():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))  # what "cuda" means from here on
    dtype, device = pick(args.dtype, args.device)
    if ranks > 1:
        dist.init_process_group("nccl" if device.type == "cuda" else "gloo")
        sys.stdout = open(os.devnull, "w") if rank else sys.stdout  # rank 0 speaks and writes
    if args.batch < ranks:
        raise ValueError(f"--batch {args.batch} is below the number of processes, {ranks}")
    prompts = Prompts(args.model, args.question, args.labels, args.format, args.max_prompt,
                      args.max_answer)
    rows, valid_rows = load_data(args)
    # Where the text does not train, its tokens need not be computed; validation still measures them
    train = encode_rows(rows, prompts, answers=args.lm_weight > 0)
    valid = encode_rows(valid_rows, prompts)
    llama = load_llama(args.model, dtype, device)
    llama.checkpointing = args.checkpointing
    model = CLSGen(add_lora(llama, args.rank, args.alpha, args.targets))
    model.start_head(prompts.label_ids)
    groups = model.parameter_groups()
    trained = groups["lora"] | groups["head"]
    if args.init_adapter and not args.resume:
        load_adapter(model, Path(args.init_adapter) / "adapter_model.safetensors", need_head=False)
    peaks = {"lora": args.lr} | ({"head": args.head_lr} if args.cls_weight else {})
    optimizer = torch.optim.AdamW(
        [{"params": list(groups[name].values()), "peak": peak} for name, peak in peaks.items()],
        lr=0.0, betas=(0.9, 0.99), weight_decay=0.0,
    )
    steps = max(1, round(args.epochs * len(train) / args.batch))
    labels = [example.label for example in train]
    epochs = range(math.ceil(steps * args.batch / len(train)))
    order = np.concatenate([epoch_order(labels, args.seed, epoch) for epoch in epochs])
    every = args.valid_every or math.ceil(len(train) / args.batch)
    few = sorted(valid_rows, key=lambda row: "explanation" not in row)[:8]
    config = {key: str(v) if isinstance(v, Path) else v for key, v in vars(args).items()
              if key not in ("out", "overwrite", "resume")}
    config |= {"device": device.type, "dtype": str(dtype).removeprefix("torch."), "steps": steps,
               "format": prompts.format, "ranks": ranks, "threads": torch.get_num_threads(),
               "base_sha256": base_fingerprint(args.model), "versions": versions()}
    for path in filter(None, (args.data, args.valid)):
        config[f"sha256 of {path}"] = hashlib.sha256(path.read_bytes()).hexdigest()
    state, best = {"config": config, "step": 0, "tokens": 0, "seconds": 0.0}, {}
    introduce(config, groups, train, valid, prompts)
    if args.resume:
        state, best = restore(args.out, trained, optimizer, config)
        print(f"going on after step {state['step']} of {steps}")
    elif rank == 0:
        args.out.mkdir(parents=True, exist_ok=True)
        for name in ("clsgen.json", STATE):  # until the end this is no finished run
            (args.out / name).unlink(missing_ok=True)
        write_atomically(args.out / "log.jsonl", json.dumps({"config": config}) + "\n")
    ddp, start = DistributedDataParallel(model) if ranks > 1 else model, time.perf_counter()
    start -= state["seconds"]
    path = os.devnull if rank else args.out / "log.jsonl"
    with (open(path, "a") as log, stop_signals() as caught,
          tqdm(total=steps, initial=state["step"], desc="train", disable=rank > 0) as bar):
        for step in range(state["step"] + 1, steps + 1):
            examples = [train[i] for i in order[(step - 1) * args.batch : step * args.batch]]
            share = schedule(step - 1, steps, args.warmup)
            parts = train_step(ddp, optimizer, examples, args, share, device, rank, ranks)
            bce, lm, stop = total([*parts, float(len(caught))], device)
            tokens, seconds = state["tokens"] + sum(map(len, examples)), time.perf_counter() - start
            state |= {"step": step, "tokens": tokens, "seconds": round(seconds, 2)}
            line = {"step": step, "bce": bce, "lm": lm, "lr": share * args.lr, "tokens": tokens,
                    "seconds": state["seconds"]}
            print(json.dumps(line), file=log, flush=True)
            rate = f"{tokens / seconds:.0f} tok/s"
            bar.set_postfix_str(f"bce {bce:.3f} lm {lm:.3f} {rate}", refresh=False)
            bar.update()
            if due := step % every == 0 or step == steps:
                measured, z = validate(model, valid, device, 4 * args.micro_batch)
                measured |= watch_text(model, prompts, few, 4 * args.micro_batch)
                if not args.cls_weight:  # the head does not train: no number of it says anything
                    measured |= {"bce": None, "auroc": None}
                print(json.dumps({"step": step, "valid": measured}), file=log, flush=True)
                bar.write(f"step {step}: validation " + "  ".join(
                    f"{name} {measured[name]:.4f}" for name in ("bce", "lm", "auroc", "base_kl")
                    if measured.get(name) is not None))
                if not best or not args.keep_best or measured["bce"] < state["best_bce"]:
                    kept = trained if args.keep_best else {}
                    best = {name: p.detach().clone() for name, p in kept.items()}
                    best["z"] = torch.tensor(z)
                    state |= {"best_bce": measured["bce"], "best_step": step}
            if rank == 0 and (due or stop or step % args.save_every == 0):
                save_state(args.out, trained, optimizer, state, best)
            if stop:
                print(f"stopped after step {step}; --resume {args.out} goes on", file=sys.stderr)
                sys.exit(128 + (caught or [signal.SIGTERM])[0])
    if ranks > 1:
        dist.destroy_process_group()
    if rank == 0:
        for name, parameter in trained.items():
            parameter.data.copy_(best.get(name, parameter))
        meta = {"base_rate": float(np.mean(labels)), "step": state["best_step"]}
        finish(args, model.eval(), prompts, valid_rows, best["z"].numpy(), meta)


if __name__ == "__main__":
    run_main(main)
