"""Joint training of CLSGen: LoRA and a score head on one Llama, both losses in every step.

    python train.py --data examples/discharge/train.jsonl --valid examples/discharge/valid.jsonl
    python train.py --resume runs/train                    # continues after the last saved step
    torchrun --nproc_per_node 8 train.py --data x.jsonl    # shares each step's rows out to 8 GPUs

The baselines are the same loop with one weight at zero: --lm-weight 0 is a plain classifier,
--cls-weight 0 plain generative fine-tuning. The run folder holds everything that a prediction needs
but the base weights; log.jsonl has the configuration, and a line for each step and each validation.

A row is what the file says, a dict; an example is the same row as tokens, and its len is that of
prompt and answer together. A step is an optimizer step over --batch examples, in micro-batches that
fit into memory. The flags and the log are in plumbing/train_arguments.py and
plumbing/training_log.py.
"""

import copy
import math
import signal
import sys
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from tqdm import tqdm

from clsgen import CLSGen, add_lora, joint_loss, label_loss, total_loss
from data import collate, encode_rows, read_rows
from metrics import auroc, sigmoid
from plumbing.adapter import load_adapter
from plumbing.checkpoint import base_fingerprint, base_name, load_llama
from plumbing.model_checks import check_base
from plumbing.ranks import Ranks
from plumbing.remarks import (
    print_remarks, refuse_contradictions, warn_of_default_question, warn_of_shared)
from plumbing.resume import restore, save_state
from plumbing.script import pick_device, run_main, stop_signals
from plumbing.split import split_valid, split_valid_formerly
from plumbing.train_arguments import (
    check_arguments, configuration, loss_weights, parse, trains_head)
from plumbing.training_log import TrainingLog, begin_run_folder, conclude, introduce
from prompts import Prompts
from run import Fitted, Run, check_read_out, fit, read_out_mark, save_run
from text_metrics import collapse


# --- the whole training ---------------------------------------------------------------------------
def main(argv=None):
    args = parse(argv)
    check_arguments(args)
    torch.manual_seed(args.seed)
    ranks = Ranks(args.device)  # one process, or one of several that torchrun has started
    dtype, device = pick_device(args.dtype, args.device, trains=True)
    ranks.connect(device)
    if args.batch < ranks.count:
        raise ValueError(f"--batch {args.batch} is below the number of processes, {ranks.count}")

    # rows as tokens; with --lm-weight 0 training skips the answers, but validation measures them
    prompts = Prompts.from_arguments(args)
    if not args.resume:
        check_base(prompts, args.model)
    train_rows, valid_rows = load_rows(args, prompts)
    train = encode_rows(train_rows, prompts, with_answers=args.lm_weight > 0)
    valid = encode_rows(valid_rows, prompts)

    # the model: a frozen base, LoRA and a score head
    llama = load_llama(args.model, dtype, device)
    llama.checkpointing = args.checkpointing
    model = CLSGen(add_lora(llama, args.rank, args.alpha, args.targets))
    if args.head_start == "random":
        model.start_head_at_random()
    else:
        model.start_head(prompts.label_ids)
    if args.init_adapter and not args.resume:
        load_adapter(model, Path(args.init_adapter) / "adapter_model.safetensors", need_head=False)
    parts = model.parameters_by_part()
    trainable = parts["lora"] | parts["head"]
    optimizer = make_optimizer(parts, args)

    # which examples each step takes: the epochs' orders in one row, so that a step may begin in one
    # epoch and end in the next. Steps are whole: up to half of one is left out, or added
    labels = [example.label for example in train]
    steps = max(1, round(args.epochs * len(train) / args.batch))
    epochs_begun = math.ceil(steps * args.batch / len(train))
    orders = [epoch_order(labels, args.seed, epoch) for epoch in range(epochs_begun)]
    order = np.concatenate(orders)

    # when to measure, and on what
    valid_every = args.valid_every or math.ceil(len(train) / args.batch)  # by default, an epoch
    explained = [row for row in valid_rows if "explanation" in row]
    unexplained = [row for row in valid_rows if "explanation" not in row]
    watched_rows = (explained + unexplained)[:8]

    # a new run folder, or one to continue with
    config = configuration(args, prompts, steps, dtype, device, ranks)
    introduce(args, config, parts, train_rows, train, valid_rows, prompts)
    state = {"config": config, "step": 0, "tokens": 0, "seconds": 0.0}
    kept = {}  # z of the last validation; with --keep-best, z and the weights of the best one
    if args.resume:
        state, kept = restore(args.out, trainable, optimizer, config, writes=ranks.rank == 0)
        check_read_out(state.get("read_out"), model)  # ValueError if it reads something else now
        print(f"continues after step {state['step']} of {steps}")
    elif ranks.rank == 0:
        begin_run_folder(args.out, config)

    wrapped = ranks.wrap(model)
    log = TrainingLog(args.out, state, steps, silent=ranks.rank > 0)
    with log, stop_signals() as caught:  # a list of the signals' numbers, empty if there is none
        for step in range(state["step"] + 1, steps + 1):
            # one optimizer step
            examples = [train[i] for i in order[(step - 1) * args.batch : step * args.batch]]
            rate = schedule(step - 1, steps, args.warmup)  # a factor on the peak learning rates
            losses = train_step(wrapped, optimizer, examples, rate, args, prompts, device, ranks)
            state["step"] = step
            state["tokens"] += sum(len(example) for example in examples)
            state["seconds"] = log.seconds()
            log.step(state, losses, rate * args.lr)

            # measure: all ranks see the same numbers
            validates = step % valid_every == 0 or step == steps
            if validates:
                measured, z = validate(model, valid, args, prompts, device, ranks)
                if not trains_head(args):  # the numbers of an untrained head mean nothing
                    measured.update({"bce": None, "auroc": None})
                measured.update(watch_text(model, prompts, watched_rows, args.micro_batch))
                log.validation(step, measured)

                # keep the last one, or with --keep-best the best: the lowest BCE. (That flag is
                # refused where the head does not train, so there is one.)
                if not args.keep_best or not kept or measured["bce"] < state["best_bce"]:
                    state.update({"best_bce": measured["bce"], "best_step": step})
                    kept = {"z": torch.tensor(z)}
                    if args.keep_best:
                        kept.update(copies(trainable))

            # save: a crash costs the steps since the last time, no more
            stop = ranks.any(caught, device)
            if ranks.rank == 0 and (validates or stop or step % args.save_every == 0):
                state["read_out"] = read_out_mark(model)
                save_state(args.out, trainable, optimizer, state, kept)
            if stop:
                log.close()
                del wrapped
                ranks.leave()
                if ranks.rank == 0:
                    print(f"stopped after step {step}; --resume {args.out} continues",
                          file=sys.stderr)
                number = caught[0] if caught else signal.SIGTERM  # another process has caught it
                sys.exit(128 + number)

    del wrapped  # DistributedDataParallel must be gone before the group of processes is
    ranks.leave()
    if ranks.rank == 0:
        if args.keep_best:
            for name, parameter in trainable.items():
                parameter.data.copy_(kept[name])
        base_rate = float(np.mean(labels))
        state["seconds"] = log.seconds()  # with the last validation
        finish(args, model, prompts, valid_rows, kept["z"].numpy(), base_rate, state)


# --- one step -------------------------------------------------------------------------------------
def train_step(model, optimizer, examples, rate, args, prompts, device, ranks):
    """One optimizer step over `examples` -> the loss terms, {name: number}.

    They are means over the whole step: all micro-batches of all ranks. rate: the factor on the peak
    learning rates. ValueError for a loss or a gradient that is not finite, before any parameter
    changes.
    """
    losses = {}
    broken = []  # rows of micro-batches whose loss is not finite
    mine = examples[ranks.rank :: ranks.count]
    micros = micro_batches(mine, args.micro_batch)
    for micro in micros:
        batch = collate(micro, device)
        # the ranks keep their gradients to themselves until the last backward pass of the step
        sharing = nullcontext()
        if micro is not micros[-1]:
            sharing = ranks.no_sync(model)
        with sharing:
            _, terms = loss_terms(model, batch, examples, args, prompts)
            loss = total_loss(terms, loss_weights(args))
            if not loss.isfinite():
                broken += ids_of(micro)
            # Each rank's loss is its part of a sum, but DistributedDataParallel takes the mean
            (ranks.count * loss).backward()
        for name, term in terms.items():
            losses[name] = losses.get(name, 0.0) + term.item()

    # all ranks see the same numbers, so that they stop together
    losses = ranks.total(losses, device)
    broken = sum(ranks.gather(broken), start=[])
    if broken:
        raise ValueError(f"the loss is not finite; rows: {broken}")

    for group in optimizer.param_groups:
        group["lr"] = rate * group["peak"]
        # LoRA and head are clipped separately: the h_P of all rows share a large mean, so the
        # head's gradient is large, and one norm over both would scale LoRA's down
        norm = torch.nn.utils.clip_grad_norm_(group["params"], args.clip)
        if not math.isfinite(norm):
            rows = ids_of(examples)
            raise ValueError(f"the gradient is not finite; rows of this step: {rows}")
    optimizer.step()
    optimizer.zero_grad()
    return losses


def loss_terms(model, batch, all_examples, args, prompts):
    """(z (B,), the loss terms by name) of a batch; each term is its part of a mean over all.

    all_examples: those of the optimizer step or of the validation that the batch is a part of.
    """
    z, logits = model(batch)
    n_tokens = count_answer_tokens(all_examples)
    terms = joint_loss(z, batch.labels, logits, batch.targets, len(all_examples), n_tokens)
    if args.label_loss:
        n_answers = sum(bool(example.answer) for example in all_examples)
        terms["label"] = label_loss(logits, batch, prompts.label_ids, args.label_loss, n_answers)
    return z, terms


def micro_batches(examples, size):
    """The examples of a step in parts of `size`, sorted by length so that each part pads little."""
    examples = sorted(examples, key=len)
    return [examples[i : i + size] for i in range(0, len(examples), size)]


def epoch_order(labels, seed, epoch):
    """A random order of the rows in which every stretch has the file's share of each class.

    Never sorted by length (that is done only within a step): the classes' explanations differ in
    length, so steps of rows sorted by length would be nearly of one class. And stratified: a step's
    class balance moves all logits together, so keeping it fixed takes away that noise, and leaves
    the expected gradient as it is.

    labels (N,) -> indices (N,).
    """
    rng = np.random.default_rng([seed, epoch])
    labels = np.array(labels)
    place = np.empty(len(labels))  # of each row in the epoch, from 0 to 1
    for label in np.unique(labels):
        rows = rng.permutation(np.flatnonzero(labels == label))
        offset = rng.random()  # one for the class: its rows are evenly spread
        place[rows] = (np.arange(len(rows)) + offset) / len(rows)
    return np.argsort(place)


def schedule(step, steps, warmup):
    """Share of the peak learning rates: linear warm-up, then linear decay. step counts from 0.

    The peak, 1, is at step rising - 1. Zero would be reached right after the last step.
    """
    rising = max(1, round(warmup * steps))
    falling = max(1, steps - rising + 1)
    return min((step + 1) / rising, (steps - step) / falling)


def make_optimizer(parts, args):
    """AdamW over LoRA and, if it trains, the head; each with its own peak rate."""
    groups = [{"params": list(parts["lora"].values()), "peak": args.lr}]
    if trains_head(args):
        groups.append({"params": list(parts["head"].values()), "peak": args.head_lr})
    # train_step sets the learning rates
    return torch.optim.AdamW(groups, lr=0.0, betas=(0.9, 0.99), weight_decay=0.0)


def count_answer_tokens(examples):
    return sum(len(example.answer) for example in examples)


def ids_of(examples):
    return [example.id for example in examples]


def copies(parameters):
    return {name: parameter.detach().clone() for name, parameter in parameters.items()}


# --- validation -----------------------------------------------------------------------------------
def validate(model, examples, args, prompts, device, ranks):
    """(the loss terms and the AUROC by name, uncalibrated logits z (N,)) of all examples.

    The ranks share the examples, and all of them get the same numbers. It takes as many rows at a
    time as training, and so no more memory.
    """
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]))
    mine = order[ranks.rank :: ranks.count]
    batches = []  # of each: the indices of its examples, their z, and its part of each loss term
    starts = range(0, len(mine), args.micro_batch)
    for start in tqdm(starts, "validation", leave=False, delay=3, disable=ranks.rank > 0):
        indices = mine[start : start + args.micro_batch]
        batch = collate([examples[i] for i in indices], device)
        with torch.inference_mode():
            batch_z, terms = loss_terms(model, batch, examples, args, prompts)
        batches.append((indices, batch_z.tolist(), {name: terms[name].item() for name in terms}))

    measured = {}
    all_z = np.zeros(len(examples))
    for batches_of_rank in ranks.gather(batches):
        for indices, z, terms in batches_of_rank:
            all_z[indices] = z
            for name, term in terms.items():
                measured[name] = measured.get(name, 0.0) + term

    if count_answer_tokens(examples) == 0:
        measured["lm"] = None  # nothing was measured
    measured["auroc"] = auroc([example.label for example in examples], sigmoid(all_z))
    return measured, all_z


def watch_text(model, prompts, rows, size):
    """The collapse meter: is what the model writes for a few rows still a text?

    At most 64 tokens are written for each. The loss and the KL from the base model are measured on
    the explanation that the row has in the file, all of it.
    """
    short = copy.copy(prompts)
    short.max_answer = min(64, prompts.max_answer)
    # Only texts are read, so any scorer would do; this one needs no trained head
    run = Run(model, short, Fitted(scorer="label_token"))
    records = run.predict(rows, batch_size=4 * size)  # a token at a time, more rows fit
    return collapse(records, run.reference_sums(rows, size))


# --- before and after -----------------------------------------------------------------------------
def load_rows(args, prompts):
    """(training, validation) rows. Prints what is odd about them; ValueError for what is refused.

    Validation rows are those of --valid, or else a share of the training rows, and at most
    --valid-rows of them.
    """
    train = read_rows(args.data)
    if not args.allow_contradictions and not args.resume:
        refuse_contradictions(args.data, train, prompts)
    warn_of_default_question(prompts.question)
    print_remarks(args.data, train, prompts)

    if args.valid:
        valid = read_rows(args.valid)
        print_remarks(args.valid, valid, prompts)
    elif args.split:
        train, valid = split_valid(train, args.valid_fraction, args.seed)
    else:  # a training of an earlier version, which split by another rule
        train, valid = split_valid_formerly(args.data, train, args.valid_fraction, args.seed)
    warn_of_shared(train, valid)

    if len(valid) > args.valid_rows:
        shuffled = np.random.default_rng(args.seed).permutation(len(valid))
        valid = [valid[i] for i in sorted(shuffled[: args.valid_rows])]
        if len({row["label"] for row in valid}) < 2:
            raise ValueError(f"--valid-rows {args.valid_rows} leaves one class only for validation")

    unexplained = [row["id"] for row in train if "explanation" not in row]
    if not trains_head(args) and unexplained:
        raise ValueError(f"--cls-weight 0 trains on explanations only; {len(unexplained)} rows "
                         f"have none, the first is {unexplained[0]!r}")
    return train, valid


def finish(args, model, prompts, rows, z, base_rate, state):
    """Fits calibration and threshold on the validation rows, saves the run, prints what came out.

    The fit: p = sigmoid(z / temperature + bias), and the label is p >= threshold.
    z (N,): the raw logits of the rows. base_rate: the share of class 1 in the training rows, and
    state["best_step"]: after which step the weights were taken; both are only put on record.
    """
    y = np.array([row["label"] for row in rows])
    scorer = "head"
    if not trains_head(args):  # the label's words are the score
        scorer = "label_token"
        z = Run(model, prompts, Fitted(scorer)).raw_logits(rows)
    fitted, sentence = fit(scorer, y, z, base_rate)
    run = Run(model, prompts, fitted, str(args.out))
    save_run(run, args.out, {
        "base": base_name(args.model),
        "base_fingerprint": base_fingerprint(args.model),
        "lora": {"rank": args.rank, "alpha": args.alpha, "targets": list(args.targets)},
        "step": state["best_step"],
    })
    conclude(run, rows, z, sentence, state["seconds"], args)


if __name__ == "__main__":
    run_main(main)
