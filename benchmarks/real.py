"""Real results: all systems on one data set, trained, evaluated and put into one JSON file.

    python benchmarks/real.py discharge                   # into runs/real, then results/*.json
    python benchmarks/real.py esnli --folder data/esnli   # its train.jsonl; valid.jsonl as the test
    python benchmarks/real.py discharge --sweep 0.1 1 3   # LM weights, on the validation rows only

The systems: majority, bag of words, the base model zero-shot, LM-only, cls-only and CLSGen, on the
same rows, all calibrated on the same validation rows. What is done already is not done again, and a
stopped training continues. Run it from the folder of train.py. Needs scikit-learn.
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

# rows: train on this many at most; held: this share of the training file is for calibration
DATA = {
    "discharge": {
        "question": "Will the patient die within 30 days?",
        "flags": "--epochs 3 --max-answer 64",
    },
    "esnli": {
        "question": "Does the premise entail the hypothesis?",
        "rows": 1500,
        "held": 0.05,
        "flags": "--epochs 2 --max-answer 80",
    },
    "pubmedqa": {
        "question": "Is the answer to the question yes?",
        "held": 0.2,
        "flags": "--epochs 3 --max-answer 160",
    },
    "clinifact": {
        "question": "Does the abstract report a positive result for the claim?",
        "held": 0.15,
        "flags": "--epochs 1 --max-answer 160",
    },
}
SPLITS = ("train", "valid", "test")


def main(argv=None):
    args = parse(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    paths = prepare(args.name, args.folder, args.work)

    # A run is named by its LM weight, or "cls" (weight 0) or "lm" (no classification loss)
    runs = [args.weight, "cls", "lm"]
    if args.sweep:
        runs = ["cls", *args.sweep, "lm"]
    costs = {}
    for run in runs:
        costs[run] = train(run, paths, args)
    about = {
        "costs": costs,
        "cpus": os.cpu_count(),
        "threads": threads_of(run_folder(runs[0], args)),
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
    }

    if args.sweep:
        report_sweep(runs, about, args)
    else:
        report_test(runs, paths, about, args)


def report_sweep(runs, about, args):
    """What the runs have on the validation rows: to a JSON file, and as a table."""
    found = {}
    for run in runs:
        found[run] = last_validation(run_folder(run, args))
    write_json(args.out / f"real_{args.name}_sweep.json", {"validation": found, **about})

    print("\n| LM weight | AUROC | log loss, raw | text NLL |\n|---|---|---|---|")
    titles = {"cls": "0", "lm": "LM-only"}
    for run, valid in found.items():
        cells = [titles.get(run, run)]
        for key in ("auroc", "bce", "lm"):
            cells.append(number(valid.get(key)))
        print("|", " | ".join(cells), "|")


def report_test(runs, paths, about, args):
    """What all systems have on the test rows: to a JSON file, and as tables."""
    report, took = evaluate(runs, paths, args)
    about["costs"]["eval"] = took
    metrics = report["metrics"]
    systems = {"majority": ("majority", None)}  # {title: (scorer in eval.json, run)}

    # bags of words; of e-SNLI, also how far the hypothesis alone gets
    rows = [read_rows(paths[split]) for split in ("train", "test", "valid")]
    metrics.update(bag_of_words(*rows))
    for name in NGRAMS:
        systems[name] = (name, None)
    if args.name == "esnli":
        hypotheses = [[hypothesis(row) for row in part] for part in rows]
        for name, found in bag_of_words(*hypotheses).items():
            title = f"{name}, hypothesis only"
            metrics[title] = found
            systems[title] = (title, None)

    # the models
    systems["zero-shot"] = ("zero-shot label token", None)
    systems["LM-only"] = (f"{run_folder('lm', args)} label token", "lm")
    systems["cls-only"] = (f"{run_folder('cls', args)} head", "cls")
    systems["CLSGen"] = (f"{run_folder(args.weight, args)} head", args.weight)

    name = f"real_{args.name}"
    if args.weight != "1":
        name += f"_weight{args.weight}"
    report.update(about)
    write_json(args.out / f"{name}.json", report)
    print_tables(metrics)
    print_markdown(report, systems)


# --- rows -----------------------------------------------------------------------------------------
def prepare(name, folder, work):
    """{split: path} of the rows that all systems see."""
    if name == "discharge":
        return {split: Path("examples/discharge") / f"{split}.jsonl" for split in SPLITS}
    paths = {split: work / f"{name}-{split}.jsonl" for split in SPLITS}
    if all(path.exists() for path in paths.values()):
        return paths

    if folder is None:
        raise ValueError(f"{name}: --folder is missing, with its train.jsonl and valid.jsonl")
    rows = read_rows(folder / "train.jsonl")
    test = read_rows(folder / "valid.jsonl")
    train, valid = split_valid(rows, DATA[name]["held"], seed=0)
    if "rows" in DATA[name]:
        order = np.random.default_rng(0).permutation(len(train))
        train = [train[i] for i in order[: DATA[name]["rows"]]]

    for path, part in zip(paths.values(), (train, valid, test), strict=True):
        lines = []
        for row in part:
            if name == "clinifact":  # it has no explanations
                row = {**row, "explanation": conclusion(row["text"])}
            lines.append(json.dumps(row, ensure_ascii=False) + "\n")
        write_atomically(path, "".join(lines))
    return paths


def conclusion(text):
    """What an abstract itself concludes, cut to 80 words.

    It is what follows the last "Conclusions:", up to the next heading. If that is missing, or has
    more than 80 words, it is the last sentence.
    """
    text = re.split(r"\s(?:clinical )?trials? registration", text, flags=re.IGNORECASE)[0]
    parts = re.split(r"(?:CONCLUSIONS?|INTERPRETATION)[ /A-Z]*:", text, flags=re.IGNORECASE)
    found = ""
    if len(parts) > 1:
        found = re.split(r"\n[A-Z ]{4,}:", parts[-1])[0].strip()
    if not 0 < len(found.split()) <= 80:
        sentences = re.split(r"(?<=[.!?])\s+(?=[A-Z])", text.strip())
        found = sentences[-1]
    return " ".join(found.split()[:80])


def hypothesis(row):
    """A row of e-SNLI without its premise."""
    last_line = row["text"].split("\n")[-1]
    return {**row, "text": last_line}


# --- work -----------------------------------------------------------------------------------------
def run_folder(run, args):
    return args.work / f"{args.name}-{run}"


def train(run, paths, args):
    """Trains one run, or continues with it. Returns its cost."""
    out = run_folder(run, args)
    data = DATA[args.name]
    flags = {"cls": "--lm-weight 0", "lm": "--cls-weight 0"}.get(run, f"--lm-weight {run}")
    command = [
        "train.py",
        "--data", paths["train"],
        "--valid", paths["valid"],
        "--model", args.model,
        "--question", data["question"],
        *data["flags"].split(),
        *flags.split(),
        "--out", out,
    ]
    resume = None
    if (out / "resume" / "state.safetensors").exists():
        resume = ["train.py", "--resume", out]
    return cost(args.work / f"{out.name}.cost.json", command, resume)


def evaluate(runs, paths, args):
    """(eval.json of the runs and the base model on the test rows, its cost)."""
    out = args.work / "-".join([args.name, "test", *runs])
    command = [
        "eval.py",
        "--data", paths["test"],
        "--model", args.model,
        "--valid", paths["valid"],
        "--out", out,
    ]
    for run in runs:
        command += ["--run", run_folder(run, args)]
    took = cost(args.work / f"{out.name}.cost.json", command)
    return read_json(out / "eval.json"), took


def cost(path, command, resume=None):
    """Runs a command of ours: {"command", "status", "seconds", "peak_memory_gb"}, kept in `path`.

    What has ended well is not run again. resume: the command that continues it, if it was stopped.
    The time adds up over the parts of a stopped run, except for a part that was killed together
    with this script.
    """
    shown = shlex.join(map(str, command))
    before = {"seconds": 0.0, "peak_memory_gb": 0.0}
    if path.exists():
        before = read_json(path)
    if before.get("command", shown) != shown:
        print(f"warning: {path} is of another command:\n  {before['command']}")
    if before.get("status") == 0:
        return before

    words = [str(word) for word in resume or command]
    print("\npython", shlex.join(words), flush=True)
    started = time.perf_counter()
    process = subprocess.Popen([sys.executable, *words])
    try:
        _, status, usage = os.wait4(process.pid, 0)
    except KeyboardInterrupt:  # the process has got it, too, and saves
        _, status, usage = os.wait4(process.pid, 0)

    bytes_per_unit = 1 if sys.platform == "darwin" else 1024
    peak = usage.ru_maxrss * bytes_per_unit / 1e9
    result = {
        "command": shown,
        "status": status,
        "seconds": before["seconds"] + time.perf_counter() - started,
        "peak_memory_gb": max(before["peak_memory_gb"], peak),
    }
    write_json(path, result)
    if status:
        raise ValueError(f"exit code {os.waitstatus_to_exitcode(status)}: {shown}")
    return result


def read_log(folder):
    with open(folder / "log.jsonl", encoding="utf-8") as file:
        return [json.loads(line) for line in file]


def threads_of(folder):
    """How many threads a run was trained with."""
    first, *_ = read_log(folder)
    return first["config"]["threads"]


def last_validation(folder):
    """What train.py measured on all validation rows after its last step, nothing fitted."""
    validations = [line["valid"] for line in read_log(folder) if "valid" in line]
    return validations[-1]


# --- tables ---------------------------------------------------------------------------------------
PROBABILITY = {  # heading: a metric, or several, of which those after the first stand in brackets
    "AUROC": "auroc",
    "AP": "average_precision",
    "F1": "f1",
    "log loss": "log_loss",
    "Brier": "brier",
    "ECE [of a perfect p: mean, 95 %]": "ece ece_floor ece_floor_q95",
}
TEXT = {
    "alignment": "auroc_alignment",
    "kappa": "kappa",
    "states a label": "parsable",
    "distinct-2": "distinct_2",
    "rep-4": "rep_4",
    "reference NLL": "reference_nll",
    "KL from base": "base_kl",
}


def print_markdown(report, systems):
    """Two tables for a README from eval.json and the costs: the probability; the text and costs."""
    print_header(PROBABILITY)
    for title, (scorer, _) in systems.items():
        print_line(title, cells(report["metrics"][scorer], PROBABILITY))

    print_header([*TEXT, "minutes", "GB"])
    for title, (scorer, run) in systems.items():
        line = cells(report["metrics"][scorer], TEXT)
        if run is not None:
            took = report["costs"][run]
            line.append(f"{took['seconds'] / 60:.0f}")
            line.append(f"{took['peak_memory_gb']:.1f}")
        print_line(title, line)


def print_header(names):
    print(f"\n| | {' | '.join(names)} |")
    print(f"|{'---|' * (1 + len(names))}")


def print_line(title, line):
    if any(line):
        print(f"| {title} | {' | '.join(line)} |")


def cells(metrics, columns):
    """The cells of one system: a value, and in brackets its interval or the other values."""
    line = []
    for names in columns.values():
        first, *others = names.split()
        more = [metrics.get(name) for name in others]
        if not others:
            more = metrics["intervals"].get(first, ())

        text = number(metrics.get(first))
        in_brackets = [number(value) for value in more]
        if any(in_brackets):
            text += f" [{', '.join(in_brackets)}]"
        line.append(text)
    return line


def number(value):
    """Three decimals, without the zero before the point; "" for None."""
    if value is None:
        return ""
    return f"{value:.3f}".lstrip("0")


# --- arguments ------------------------------------------------------------------------------------
def weight(text):
    """A flag's LM weight, as it was written: it names the run's folder."""
    if not 0 < float(text) < float("inf"):
        raise ValueError(text)
    return text


def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("name", choices=DATA, help="data set")
    add("--folder", type=Path, help="of its train.jsonl and valid.jsonl; discharge is bundled")
    add("--model", type=Path, default=Path("models/smollm2-135m"), help="folder of the base")
    add("--weight", type=weight, default="1", help="LM weight of CLSGen")
    add("--sweep", nargs="+", type=weight, metavar="WEIGHT",
        help="LM weights next to 0, on validation rows; reads no test row")
    add("--work", type=Path, default=Path("runs/real"), help="folder of the runs")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON")
    return parser.parse_args(argv)


if __name__ == "__main__":
    run_main(main)
