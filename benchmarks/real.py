"""Real results: every scorer on one data set, trained, evaluated and put into one JSON file.

    python benchmarks/real.py discharge                   # into runs/real, then results/*.json
    python benchmarks/real.py esnli --folder data/esnli   # its train.jsonl; valid.jsonl as the test
    python benchmarks/real.py discharge --sweep 0.1 1 3   # LM weights, on the validation rows only

Scorers: majority, bag of words, the base model zero-shot, LM-only, cls-only and CLSGen, on the same
rows, all calibrated on the same validation rows. What is there already is not done again, and a
stopped training goes on. To be run from the folder of train.py; needs scikit-learn.
"""

import argparse
import json
import os
import platform
import re
import shlex
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from data import read_rows, split_valid  # noqa: E402
from eval import print_tables  # noqa: E402
from plumbing.files import read_json, write_atomically, write_json  # noqa: E402
from plumbing.script import run_main  # noqa: E402
from tfidf import NGRAMS, bag_of_words  # noqa: E402

# `rows` to train on at most; `held` back from the training file for calibration, as a share
DATA = {
    "discharge": {"question": "Will the patient die within 30 days?",
                  "flags": "--epochs 3 --max-answer 64"},
    "esnli": {"question": "Does the premise entail the hypothesis?", "rows": 1500, "held": 0.05,
              "flags": "--epochs 2 --max-answer 80"},
    "pubmedqa": {"question": "Is the answer to the question yes?", "held": 0.2,
                 "flags": "--epochs 3 --max-answer 160"},
    "clinifact": {"question": "Does the abstract report a positive result for the claim?",
                  "held": 0.15, "flags": "--epochs 1 --max-answer 160"},
}


# --- rows -----------------------------------------------------------------------------------------
def conclusion(text):
    """What an abstract itself concludes, cut to 80 words: what follows its last "Conclusions:", up
    to the next heading; where that is missing or longer, the last sentence."""
    text = re.split(r"\s(?:clinical )?trials? registration", text, flags=re.IGNORECASE)[0]
    parts = re.split(r"(?:CONCLUSIONS?|INTERPRETATION)[ /A-Z]*:", text, flags=re.IGNORECASE)
    found = re.split(r"\n[A-Z ]{4,}:", parts[-1])[0].strip() if len(parts) > 1 else ""
    if not 0 < len(found.split()) <= 80:
        found = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text.strip())[-1]
    return " ".join(found.split()[:80])


def hypothesis(row):
    """A row of e-SNLI without its premise."""
    return row | {"text": row["text"].split("\n")[-1]}


def prepare(name, folder, work):
    """{split: path} of the rows that all scorers see."""
    names = ("train", "valid", "test")
    if name == "discharge":
        return {split: Path("examples/discharge") / f"{split}.jsonl" for split in names}
    paths = {split: work / f"{name}-{split}.jsonl" for split in names}
    if not all(path.exists() for path in paths.values()):
        if folder is None:
            raise ValueError(f"{name}: --folder is missing, with its train.jsonl and valid.jsonl")
        rows, test = read_rows(folder / "train.jsonl"), read_rows(folder / "valid.jsonl")
        train, valid = split_valid(rows, DATA[name]["held"], seed=0)
        if "rows" in DATA[name]:
            train = [train[i] for i in np.random.default_rng(0).permutation(len(train))]
            train = train[: DATA[name]["rows"]]
        if name == "clinifact":
            train, valid, test = ([row | {"explanation": conclusion(row["text"])} for row in part]
                                  for part in (train, valid, test))
        for path, part in zip(paths.values(), (train, valid, test), strict=True):
            lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in part]
            write_atomically(path, "".join(lines))
    return paths


# --- work -----------------------------------------------------------------------------------------
def cost(path, command, resume=None):
    """Runs one of our commands (`resume`: the same, going on) -> {"command", "seconds",
    "peak_memory_gb"}, kept in `path`; what is there is not done again. Time adds up over the parts
    of a stopped run, but for one that was killed together with this script."""
    command = [str(word) for word in command]
    before = read_json(path) if path.exists() else {"seconds": 0.0, "peak_memory_gb": 0.0}
    if before.get("command", shlex.join(command)) != shlex.join(command):
        print(f"warning: {path} is of another command:\n  {before['command']}")
    if before.get("status") == 0:
        return before
    words = list(map(str, resume or command))
    print("\npython", shlex.join(words), flush=True)
    start, process = time.perf_counter(), subprocess.Popen([sys.executable, *words])
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:  # the process has got it too, and saves
        _, status, usage = os.wait4(process.pid, 0)
    peak = usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 1e9
    result = {"command": shlex.join(command), "status": status,
              "seconds": before["seconds"] + time.perf_counter() - start,
              "peak_memory_gb": max(before["peak_memory_gb"], peak)}
    write_json(path, result)
    if status:
        raise ValueError(f"exit code {os.waitstatus_to_exitcode(status)}: {result['command']}")
    return result


def train(name, run, paths, args):
    """Trains one run, or goes on with it -> its cost."""
    out = args.work / f"{name}-{run}"
    flags = {"cls": "--lm-weight 0", "lm": "--cls-weight 0"}.get(run, f"--lm-weight {run}")
    command = ["train.py", "--data", paths["train"], "--valid", paths["valid"], "--model",
               args.model, "--question", DATA[name]["question"], *DATA[name]["flags"].split(),
               *flags.split(), "--out", out]
    stopped = (out / "resume" / "state.safetensors").exists()
    resume = ["train.py", "--resume", out] if stopped else None
    return cost(args.work / f"{name}-{run}.cost.json", command, resume)


def evaluate(name, runs, paths, args):
    """(eval.json of some runs and the base model on the test rows, its cost)"""
    out = args.work / "-".join([name, "test", *runs])
    command = ["eval.py", "--data", paths["test"], "--model", args.model, "--valid", paths["valid"],
               "--out", out]
    for run in runs:
        command += ["--run", args.work / f"{name}-{run}"]
    took = cost(out.with_name(f"{out.name}.cost.json"), command)
    return read_json(out / "eval.json"), took


def last_validation(folder):
    """What train.py measured on all validation rows after its last step, nothing fitted."""
    with open(folder / "log.jsonl", encoding="utf-8") as file:
        *_, last = (line["valid"] for line in map(json.loads, file) if "valid" in line)
    return last


# --- tables ---------------------------------------------------------------------------------------
def number(value):
    return "" if value is None else f"{value:.3f}".lstrip("0")


def markdown(report, names):
    """Two tables for a README out of eval.json and costs: probability, then text and cost."""
    def cell(one, *keys):
        """The first value, in brackets its interval or the other values."""
        values = [one.get(key) for key in keys]
        values += one["intervals"].get(keys[0], ()) if len(keys) == 1 else ()
        first, *more = map(number, values)
        return first + f" [{', '.join(more)}]" * any(more)

    for columns in (
        {"AUROC": "auroc", "AP": "average_precision", "F1": "f1", "log loss": "log_loss",
         "Brier": "brier", "ECE [of a perfect p: mean, 95 %]": "ece ece_floor ece_floor_q95"},
        {"alignment": "auroc_alignment", "kappa": "kappa", "states a label": "parsable",
         "distinct-2": "distinct_2", "rep-4": "rep_4", "reference NLL": "reference_nll",
         "KL from base": "base_kl"}):
        more = ["minutes", "GB"] * ("AUROC" not in columns)
        print(f"\n| | {' | '.join([*columns, *more])} |")
        print(f"|{'---|' * (1 + len(columns) + len(more))}")
        for title, (scorer, run) in names.items():
            one, took = report["metrics"][scorer], report["costs"].get(run)
            cells = [cell(one, *keys.split()) for keys in columns.values()]
            if more and took:
                cells += [f"{took['seconds'] / 60:.0f}", f"{took['peak_memory_gb']:.1f}"]
            if any(cells):
                print(f"| {title} | {' | '.join(cells)} |")


def weight(text):
    """A flag's LM weight, as it was written: it names the run's folder."""
    if not 0 < float(text) < float("inf"):
        raise ValueError(text)
    return text


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("name", choices=DATA, help="data set")
    add("--folder", type=Path, help="of its train.jsonl and valid.jsonl; discharge is bundled")
    add("--model", type=Path, default=Path("models/smollm2-135m"), help="folder of the base")
    add("--weight", type=weight, default="1", help="LM weight of CLSGen")
    add("--sweep", nargs="+", type=weight, metavar="WEIGHT",
        help="LM weights beside 0, on validation rows; reads no test row")
    add("--work", type=Path, default=Path("runs/real"), help="folder of the runs")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    paths = prepare(args.name, args.folder, args.work)
    runs = ["cls", *args.sweep, "lm"] if args.sweep else [args.weight, "cls", "lm"]
    costs = {run: train(args.name, run, paths, args) for run in runs}
    folders = {run: args.work / f"{args.name}-{run}" for run in runs}
    with open(folders[runs[0]] / "log.jsonl", encoding="utf-8") as file:
        threads = json.loads(next(file))["config"]["threads"]
    about = {"costs": costs, "cpus": os.cpu_count(), "threads": threads,
             "processor": torch.cpu.get_capabilities().get("cpu_name", platform.processor())}
    if args.sweep:
        found = {run: last_validation(folder) for run, folder in folders.items()}
        write_json(args.out / f"real_{args.name}_sweep.json", {"validation": found} | about)
        print("\n| LM weight | AUROC | log loss, raw | text NLL |\n|---|---|---|---|")
        for run, one in found.items():
            print("|", " | ".join([{"cls": "0", "lm": "LM-only"}.get(run, run), *map(number, (
                one.get(key) for key in ("auroc", "bce", "lm")))]), "|")
        return
    report, costs["eval"] = evaluate(args.name, runs, paths, args)
    rows = [read_rows(paths[split]) for split in ("train", "test", "valid")]
    report["metrics"] |= bag_of_words(*rows)
    names = {"majority": ("majority", "")} | {name: (name, "") for name in NGRAMS}
    if args.name == "esnli":
        found = bag_of_words(*(list(map(hypothesis, part)) for part in rows))
        found = {f"{name}, hypothesis only": metrics for name, metrics in found.items()}
        report["metrics"] |= found
        names |= {name: (name, "") for name in found}
    names |= {"zero-shot": ("zero-shot label token", "")}
    names |= {title: (f"{folders[run]} {'label token' if run == 'lm' else 'head'}", run)
              for title, run in (("LM-only", "lm"), ("cls-only", "cls"), ("CLSGen", args.weight))}
    other = f"_weight{args.weight}" * (args.weight != parser.get_default("weight"))
    write_json(args.out / f"real_{args.name}{other}.json", report | about)
    print_tables(report["metrics"])
    markdown(report | about, names)


if __name__ == "__main__":
    run_main(main)
