"""What a training says: its first screen, the progress bar, log.jsonl, and its last screen."""

import json
import os
import shlex
import sys
import textwrap
import time

import numpy as np
from tqdm import tqdm

from data import print_counts, print_line, show
from metrics import calibrated, interval_warnings, score_metrics
from plumbing.files import write_atomically
from plumbing.resume import STATE
from plumbing.script import peak_memory, printable
from plumbing.tables import cell

# Measured at each validation, but too much for the screen
LOGGED_ONLY = ("parsable", "empty", "distinct_2", "rep_4", "reference_nll")

FEW_STEPS = 30  # below it the first screen has a warning


def begin_run_folder(folder, config):
    """An empty log in the folder, and nothing that looks like a finished or a stopped run."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("clsgen.json", STATE):
        (folder / name).unlink(missing_ok=True)
    write_atomically(folder / "log.jsonl", json.dumps({"config": config}) + "\n")


def introduce(args, config, parts, train_rows, train, valid_rows, prompts):
    """The first screen: what a person checks before a long training.

    train: the training rows as examples.
    """
    print_counts(train_rows, train, prompts)
    positives = sum(row["label"] for row in valid_rows)
    print_line("validation", f"{len(valid_rows)} rows: {positives} {prompts.word(1)}, "
                             f"{len(valid_rows) - positives} {prompts.word(0)}")

    weights = {}
    for part, parameters in parts.items():
        weights[part] = sum(parameter.numel() for parameter in parameters.values())
    print_line("model", f"{printable(args.model)}, {config['dtype']} on {config['device']}")
    print_line("trains", f"{weights['lora']:,} weights of LoRA, {weights['head']:,} of the score "
                         f"head; {weights['frozen']:,} are frozen")
    if args.cls_weight == 0:
        print_line("", "--cls-weight 0: the score head is not used")
    tokens = sum(len(example) for example in train)
    print_line("steps", f"{config['steps']}, of {args.batch} rows; {tokens:,} tokens an epoch")
    print_line("log", f"{printable(str(args.out))}/log.jsonl; its first line has all settings")

    print(f"\nthe first row, format {prompts.format}:\n\n{show(train[0], prompts)}\n")
    if config["steps"] < FEW_STEPS:
        plural = "" if config["steps"] == 1 else "s"
        print(f"warning: {len(train)} training rows, {config['batch']} a step, make only "
              f"{config['steps']} step{plural}, which is too few to learn much: more rows, more "
              f"--epochs or a smaller --batch make more\n")
    sys.stdout.flush()


class TrainingLog:
    """log.jsonl and the progress bar: a line for each step, and one for each validation."""

    def __init__(self, folder, state, steps, silent):
        self.file = open(os.devnull if silent else folder / "log.jsonl", "a")
        self.bar = tqdm(total=steps, initial=state["step"], desc="train", disable=silent)
        self.start = time.perf_counter() - state["seconds"]
        self.steps = 0  # of this process
        self.first_step_ended = None  # when

    def seconds(self):
        """How long this training has taken so far, before and after it was resumed."""
        return round(time.perf_counter() - self.start, 2)

    def step(self, state, losses, learning_rate):
        record = {"step": state["step"], **losses, "lr": learning_rate,
                  "tokens": state["tokens"], "seconds": state["seconds"]}
        print(json.dumps(record), file=self.file, flush=True)

        shown = " ".join(f"{name} {value:.3f}" for name, value in losses.items())
        speed = state["tokens"] / max(state["seconds"], 0.01)
        self.bar.set_postfix_str(f"{shown} {speed:.0f} tok/s", refresh=False)
        self.bar.update()

        # the first step is slow, so the third is the first to judge by
        self.steps += 1
        if self.steps == 1:
            self.first_step_ended = time.perf_counter()
        if self.steps == 3:
            seconds_a_step = (time.perf_counter() - self.first_step_ended) / 2
            minutes = seconds_a_step * (self.bar.total - state["step"]) / 60
            self.bar.write(f"about {max(1, round(minutes))} min to go, without validations")

    def validation(self, step, measured):
        print(json.dumps({"step": step, "valid": measured}), file=self.file, flush=True)

        shown = []
        for name, value in measured.items():
            if value is not None and name not in LOGGED_ONLY:
                shown.append(f"{name} {value:.4f}")
        self.bar.write(f"step {step}: validation {'  '.join(shown)}")

    def close(self):
        self.bar.close()
        self.file.close()

    def __enter__(self):
        return self

    def __exit__(self, *error):
        self.close()


def conclude(run, rows, z, sentence, seconds, args):
    """The last screen: three predictions, and five lines.

    rows, z: the validation rows and their raw logits (N,); sentence: what run.fit has said.
    """
    first_middle_last = {0, len(rows) // 2, len(rows) - 1}  # of two rows, two of them are the same
    for record in run.predict([rows[i] for i in sorted(first_middle_last)]):
        stated = "nothing"
        if record["stated_label"] is not None:
            stated = run.prompts.labels[record["stated_label"]]
        print(f"\nrow {record['id']!r}: probability {record['probability']:.3f}, label "
              f"{run.prompts.labels[record['true_label']]}; the text states {stated}:\n"
              f"  {textwrap.shorten(printable(record['explanation']), 400)}")
    print()

    y = np.array([row["label"] for row in rows])
    groups = [row.get("group") for row in rows]
    p = calibrated(z, run.fitted.temperature, run.fitted.bias)
    measured = score_metrics(y, p, groups=groups)
    for warning in interval_warnings(y, groups):
        print(f"warning: {warning}")
    print_line("validation", f"AUROC {cell(measured, 'auroc')}, log loss "
                             f"{cell(measured, 'log_loss')} on {len(y)} rows")
    print_line("fitted there", sentence)
    print_line("cost", f"{seconds / 60:.1f} min, {peak_memory(run.device)}")
    print_line("run folder", printable(str(args.out)))

    # the test file next to the training file, if there is one
    test = args.data.with_name("test.jsonl")
    if not test.exists() or test in (args.data, args.valid):
        test = "TEST.jsonl"  # the user's
    command = shlex.join(["python", "eval.py", "--run", str(args.out), "--data", str(test)])
    print_line("next", printable(command))
