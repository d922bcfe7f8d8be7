"""What a training says: its first screen, the progress bar, and log.jsonl."""

import json
import os
import sys
import time

from tqdm import tqdm

from data import show
from plumbing.files import write_atomically
from plumbing.resume import STATE

# Measured at each validation, but too much for the screen
LOGGED_ONLY = ("parsable", "empty", "distinct_2", "rep_4", "reference_nll")

FEW_STEPS = 30  # below it the first screen has a warning


def begin_run_folder(folder, config):
    """An empty log in the folder, and nothing that looks like a finished or a stopped run."""
    folder.mkdir(parents=True, exist_ok=True)
    for name in ("clsgen.json", STATE):
        (folder / name).unlink(missing_ok=True)
    write_atomically(folder / "log.jsonl", json.dumps({"config": config}) + "\n")


def introduce(config, parts, train, valid, prompts):
    """The first screen: configuration, what trains, how much data, one row as the model sees it."""
    for key, value in config.items():
        if isinstance(value, list):
            value = " ".join(map(str, value))
        print(f"{key:15} {value}")
    for name, parameters in parts.items():
        count = sum(parameter.numel() for parameter in parameters.values())
        print(f"{name:7} {count:>12,} parameters")

    tokens = sum(len(example) for example in train)
    cut = sum(example.tokens_cut > 0 for example in train)
    unexplained = sum(not example.answer for example in train)
    print(f"train   {len(train):>12,} rows, {tokens:,} tokens an epoch, {cut} texts cut; "
          f"{unexplained} rows train the score head only")
    print(f"valid   {len(valid):>12,} rows\n\n{show(train[0], prompts)}\n")
    if config["steps"] < FEW_STEPS:
        print(f"warning: {len(train)} training rows, {config['batch']} a step, make only "
              f"{config['steps']} steps, which is too few to learn much: more rows, more --epochs "
              f"or a smaller --batch make more\n")
    sys.stdout.flush()


class TrainingLog:
    """log.jsonl and the progress bar: a line for each step, and one for each validation."""

    def __init__(self, folder, state, steps, silent):
        self.file = open(os.devnull if silent else folder / "log.jsonl", "a")
        self.bar = tqdm(total=steps, initial=state["step"], desc="train", disable=silent)
        self.start = time.perf_counter() - state["seconds"]

    def seconds(self):
        """How long this training has taken so far, before and after it was resumed."""
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
