"""Real results: every scorer on one data set, trained, evaluated and put into one JSON file.

    python benchmarks/real.py discharge                   # into runs/real, then results/*.json
    python benchmarks/real.py esnli --folder data/esnli   # its train.jsonl; valid.jsonl as the test
    python benchmarks/real.py discharge --sweep           # LM weights, on the validation rows only

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

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

from clsgen import run_main, write_atomically, write_json  # noqa: E402
from data import read_rows, split_valid  # noqa: E402
from eval import print_tables  # noqa: E402
from model import read_json  # noqa: E402
from tfidf import bag_of_words  # noqa: E402

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
WEIGHTS = ("cls", "0.01", "0.1", "0.3", "1", "3")  # of the LM loss; cls-only is 0


# --- rows -----------------------------------------------------------------------------------------
def conclusion(text):
    """What an abstract itself concludes: what follows its last "Conclusions:", up to the next
    heading; or its last sentence, also where that is over 80 words."""
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
def cost(path, command):
    """Runs one of our commands -> {"command", "seconds", "peak_memory_gb"}, kept in `path`; what is
    there is not done again. Time adds up over the parts of a stopped run."""
    command = [str(word) for word in command]
    before = read_json(path) if path.exists() else {"seconds": 0.0, "peak_memory_gb": 0.0}
    if before.get("status") == 0:
        return before
    print("\npython", shlex.join(command), flush=True)
    start, process = time.perf_counter(), subprocess.Popen([sys.executable, *command])
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
    if (out / "resume" / "state.safetensors").exists():
        command = ["train.py", "--resume", out]
    return cost(args.work / f"{name}-{run}.cost.json", command)


def evaluate(name, runs, rows, more, args):
    """(eval.json of some runs on a file of rows, its cost)"""
    out = args.work / f"{name}-{rows.stem}"
    command = ["eval.py", "--data", rows, *more, "--out", out]
    for run in runs:
        command += ["--run", args.work / f"{name}-{run}"]
    took = cost(args.work / f"{name}-{rows.stem}.cost.json", command)
    return read_json(out / "eval.json"), took


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("name", choices=DATA, help="data set")
    add("--folder", type=Path, help="of its train.jsonl and valid.jsonl; discharge is bundled")
    add("--model", type=Path, default=Path("models/smollm2-135m"), help="folder of the base")
    add("--weight", default="1", help="LM weight of CLSGen")
    add("--sweep", action="store_true", help="all LM weights instead, on the validation rows")
    add("--work", type=Path, default=Path("runs/real"), help="folder of the runs")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON")
    args = parser.parse_args(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    paths = prepare(args.name, args.folder, args.work)
    runs = [*WEIGHTS, "lm"] if args.sweep else [args.weight, "cls", "lm"]
    costs = {run: train(args.name, run, paths, args) for run in runs}
    if args.sweep:
        report, costs["eval"] = evaluate(args.name, runs, paths["valid"], [], args)
    else:
        more = ["--model", args.model, "--valid", paths["valid"]]
        report, costs["eval"] = evaluate(args.name, runs, paths["test"], more, args)
        rows = {split: read_rows(path) for split, path in paths.items()}
        report["metrics"] |= bag_of_words(rows["train"], rows["test"], rows["valid"])
        if args.name == "esnli":
            rows = {split: list(map(hypothesis, part)) for split, part in rows.items()}
            report["metrics"] |= {
                f"hypothesis only, {name}": metrics for name, metrics in
                bag_of_words(rows["train"], rows["test"], rows["valid"]).items()}
    report["costs"], report["cpus"] = costs, os.cpu_count()
    report["processor"] = platform.processor() or platform.machine()
    write_json(args.out / f"real_{args.name}{'_sweep' * args.sweep}.json", report)
    print_tables(report["metrics"])
    for run, took in costs.items():
        print(f"{run:6}{took['seconds'] / 60:8.1f} minutes{took['peak_memory_gb']:8.2f} GB")


if __name__ == "__main__":
    run_main(main)
