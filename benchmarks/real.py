"""Real results: every system on every data set, trained and evaluated, one JSON file each.

    python benchmarks/real.py --all --folder data    # everything; the same command continues
    python benchmarks/real.py notes                  # one data set; the notes are bundled
    python benchmarks/result_tables.py               # the tables of what is done

A job is one system on one data set with one seed: it trains, evaluates, and writes one file of
results/. A job whose file exists is skipped. --jobs of them run at a time, each in a process with
one thread. Ctrl-C stops them cleanly: a training saves its step, and the same command continues
with it. On a GPU (--device cuda --jobs 8) all of it takes minutes instead of a day.

The rows are those of examples/public_data.py: --folder has esnli/, comve/, pubmedqa/ and
clinifact/, each with train.jsonl and test.jsonl. Validation rows are split off train.jsonl, and all
systems see the same rows. Run it from the folder of train.py. Needs scikit-learn.
"""

import argparse
import json
import multiprocessing
import os
import platform
import re
import shlex
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from contextlib import redirect_stderr, redirect_stdout
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks")]

import eval as evaluation  # noqa: E402
import predict  # noqa: E402
import tfidf  # noqa: E402
import train  # noqa: E402
from clsgen import CLSGen, states_at  # noqa: E402
from data import read_rows  # noqa: E402
from metrics import clipped_logit, none_if_undefined, score_metrics  # noqa: E402
from plumbing.files import read_json, write_atomically, write_json  # noqa: E402
from plumbing.resume import STATE  # noqa: E402
from plumbing.script import exit_code, peak_bytes, run_main, stop_signals, versions  # noqa: E402
from plumbing.split import split_valid  # noqa: E402
from swapped import compare  # noqa: E402

SCRIPTS = {
    "train.py": train.main,
    "eval.py": evaluation.main,
    "predict.py": predict.main,
    "benchmarks/tfidf.py": tfidf.main,
}


# --- what is run ----------------------------------------------------------------------------------
@dataclass
class DataSet:
    """How a data set is used."""

    question: str
    epochs: float
    seeds: int
    max_answer: int  # tokens
    rows: int | None = None  # train on this many at most
    valid_share: float | None = None  # of train.jsonl; None: it has a valid.jsonl
    gpu_rows: int = 16  # of one forward pass in training, on a GPU


SETS = {
    "notes": DataSet("Will the patient die within 30 days?", 2, seeds=3, max_answer=64, rows=1200),
    "esnli": DataSet("Does the premise entail the hypothesis?", 2, seeds=3, max_answer=80,
                     rows=1500, valid_share=0.05),
    "comve": DataSet("Is the second statement the one against common sense?", 1, seeds=3,
                     max_answer=48, rows=3000, valid_share=0.05),
    "pubmedqa": DataSet("Is the answer to the question yes?", 3, seeds=1, max_answer=160,
                        valid_share=0.2, gpu_rows=4),
    "clinifact": DataSet("Is the abstract evidence for the claim?", 1, seeds=1, max_answer=160,
                         valid_share=0.15, gpu_rows=4),
}

# What is trained, and its flags. First those that ask what the second head adds
ABLATION = {
    "lm-only-vocabulary": "--cls-weight 0 --label-loss vocabulary",
    "lm-only-words": "--cls-weight 0 --label-loss words",
    "clsgen-random": "--head-start random",
    "clsgen-label-words": "--head-start label-words",
}
OTHERS = {
    "cls-only": "--lm-weight 0",
    "lm-only": "--cls-weight 0",
}
# A head that is really separate: the BCE trains the head alone, LoRA learns from the text alone
DETACHED = "clsgen-detached"
TRIAL = {DETACHED: "--head-start label-words"}
TRAINED = ABLATION | OTHERS
BASELINES = "baselines"  # majority and bags of words
ZERO_SHOT = "zero-shot"  # the base model: its label token, and the confidence that it states

FIRST_SETS = ("notes", "esnli")
UNUSED = 500  # rows at most that are neither trained, calibrated nor tested on


@dataclass
class Job:
    """One system on one data set, with one seed if it is trained."""

    data: str
    system: str
    seed: int | None = None

    @property
    def title(self):
        if self.seed is None:
            return f"{self.data}-{self.system}"
        return f"{self.data}-{self.system}-s{self.seed}"


def all_jobs(names):
    """All jobs of these data sets, in the order of work."""
    first = [name for name in names if name in FIRST_SETS]
    jobs = []
    for name in first:
        jobs += trained_jobs(name, ABLATION)
    for name in first:
        jobs += trained_jobs(name, OTHERS) + untrained_jobs(name)
    for name in names:
        if name not in first:
            jobs += trained_jobs(name, TRAINED) + untrained_jobs(name)
    for name in first:
        jobs += trained_jobs(name, TRIAL)
    return jobs


def trained_jobs(name, systems):
    """Seed by seed, so that a stop leaves whole comparisons."""
    jobs = []
    for seed in range(SETS[name].seeds):
        for system in systems:
            jobs.append(Job(name, system, seed))
    return jobs


def untrained_jobs(name):
    return [Job(name, BASELINES), Job(name, ZERO_SHOT)]


def main(argv=None):
    args = parse(argv)
    args.work.mkdir(parents=True, exist_ok=True)
    args.out.mkdir(parents=True, exist_ok=True)
    names = list(SETS) if args.all else [args.name]
    for name in names:
        prepare(name, args)

    jobs = all_jobs(names)
    left = [job for job in jobs if not result_path(job, args).exists()]
    print(f"{len(jobs)} jobs, {len(jobs) - len(left)} done before", flush=True)
    run_jobs(left, args)


# --- rows -----------------------------------------------------------------------------------------
def rows_path(name, split, args):
    """Where the rows of a split lie that all systems see."""
    if name == "notes" and split in ("train", "valid", "test"):
        return Path("examples/discharge") / f"{split}.jsonl"
    return args.work / f"{name}-{split}.jsonl"


def prepare(name, args):
    """Writes the rows of a data set for all systems, the same bytes each time.

    Those that no system uses are for the choice of a calibration (benchmarks/calibration.py).
    """
    if name == "notes":
        rows = fresh_notes(args)
        write_rows(rows_path(name, "unused", args), rows)
        return
    folder = args.folder / name
    about = SETS[name]
    test = read_rows(folder / "test.jsonl")
    rows = sorted(read_rows(folder / "train.jsonl"), key=lambda row: str(row["id"]))
    train, valid = split_valid(rows, about.valid_share, seed=0)
    splits = {"train": train, "valid": valid, "test": test}
    if about.rows is not None:
        order = np.random.default_rng(0).permutation(len(train))
        splits["train"] = [train[i] for i in order[: about.rows]]
        left = order[about.rows :][:UNUSED]
        if len(left) > 0:
            splits["unused"] = [train[i] for i in left]
    if (folder / "test_swapped.jsonl").exists():
        splits["swapped"] = read_rows(folder / "test_swapped.jsonl")
    for split, rows in splits.items():
        if name == "clinifact":  # it has no explanations
            rows = [{**row, "explanation": conclusion(row["text"])} for row in rows]
        write_rows(rows_path(name, split, args), rows)


def fresh_notes(args):
    """Notes that are in none of the three files, drawn with another seed."""
    out = args.work / "fresh-notes"
    command = [sys.executable, "examples/discharge/generate.py", "--seed", "31", "--out", str(out)]
    subprocess.run(command, check=True, stdout=subprocess.DEVNULL)
    used = set()
    for split in ("train", "valid", "test"):
        used.update(row["text"] for row in read_rows(rows_path("notes", split, args)))
    fresh = [row for row in read_rows(out / "train.jsonl") if row["text"] not in used]
    return fresh[:UNUSED]


def write_rows(path, rows):
    lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
    write_atomically(path, "".join(lines))


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


# --- the steps of a job ---------------------------------------------------------------------------
@dataclass
class Step:
    """One command of a job."""

    name: str
    command: list
    result: Path  # exists once the step is done
    resume: Callable = lambda: None  # the command that continues it, if it was stopped


def job_folder(job, args):
    return args.work / job.title


def result_path(job, args):
    return args.out / f"{job.title}.json"


def steps_of(job, args):
    """The commands of a job, in order."""
    folder = job_folder(job, args)
    train_rows = rows_path(job.data, "train", args)
    valid_rows = rows_path(job.data, "valid", args)
    test_rows = rows_path(job.data, "test", args)
    swapped_rows = rows_path(job.data, "swapped", args)
    run = folder / "run"

    if job.system == BASELINES:
        out = folder / "tfidf.json"
        command = ["benchmarks/tfidf.py", "--data", train_rows, "--valid", valid_rows,
                   "--test", test_rows, "--out", out]
        return [Step("bags of words", command, out)]

    micro_batch = []  # the scripts' defaults, which suit a CPU
    batch = []
    if args.device != "cpu":
        micro_batch = ["--micro-batch", SETS[job.data].gpu_rows]
        batch = ["--batch", 64]

    evaluate = ["eval.py", "--run", run, "--data", test_rows, *batch, "--device", args.device]
    evaluate += ["--out", folder / "eval"]
    if job.system == ZERO_SHOT:
        # eval.py asks the base model with the prompts of a run: one that has trained for one step
        flags = ["--epochs", 0.001]
        evaluate += ["--model", args.model, "--valid", valid_rows]
    else:
        flags = ["--epochs", SETS[job.data].epochs, "--seed", job.seed]
        flags += (TRAINED | TRIAL)[job.system].split()
    training = [
        "train.py",
        "--data", train_rows,
        "--valid", valid_rows,
        "--valid-rows", 1000,
        "--valid-every", 1_000_000,  # after the last step only: the loss is in each step's line
        "--model", args.model,
        "--question", SETS[job.data].question,
        "--max-answer", SETS[job.data].max_answer,
        "--device", args.device,
        *micro_batch,
        *flags,
        "--out", run,
    ]

    def resume():
        if (run / STATE).exists():
            return ["train.py", "--resume", run]
        if (run / "log.jsonl").exists():  # killed before it had saved anything
            return [*training, "--overwrite"]

    steps = [
        Step("train", training, run / "clsgen.json", resume),
        Step("eval", evaluate, folder / "eval" / "eval.json"),
    ]
    if job.system == ZERO_SHOT:
        return steps

    # the rows that are not test rows: their numbers alone
    predictions = ["predict.py", "--run", run, *batch, "--device", args.device]
    for name in ("valid", "unused"):
        rows = rows_path(job.data, name, args)
        out = folder / f"{name}.jsonl"
        if rows.exists():
            command = [*predictions, "--data", rows, "--no-explain", "--out", out]
            steps.append(Step(name, command, out))
    if swapped_rows.exists():
        out = folder / "swapped.jsonl"
        steps.append(Step("swapped", [*predictions, "--data", swapped_rows, "--out", out], out))
    return steps


# --- several jobs at a time -----------------------------------------------------------------------
def run_jobs(pending, args):
    """Runs the jobs, --jobs of them at a time. ValueError at the end if some have failed.

    A failed job does not stop the others. The first Ctrl-C is passed on to all of them, which
    save, and then it is raised.
    """
    pending = list(pending)
    running = {}  # {job's title: its process}
    failed = []
    with stop_signals() as caught:
        is_passed_on = False
        try:
            while running or (pending and not caught):
                # start
                while pending and len(running) < args.jobs and not caught:
                    job = pending.pop(0)
                    running[job.title] = start(job, args)

                # stop
                if caught and not is_passed_on:
                    is_passed_on = True
                    for process in running.values():
                        os.kill(process.pid, signal.SIGINT)

                # see what has ended
                time.sleep(0.2)
                for title, process in list(running.items()):
                    if process.exitcode is None:
                        continue
                    del running[title]
                    if process.exitcode == 0:
                        print(f"{clock()} {title}: done, {len(pending)} wait", flush=True)
                    elif not caught:
                        failed.append(title)
                        log = args.work / title / "log.txt"
                        print(f"{clock()} {title}: has failed; see {log}", flush=True)
        finally:  # a second Ctrl-C, or an error of ours
            for process in running.values():
                process.terminate()

    if caught:
        raise KeyboardInterrupt
    if failed:
        raise ValueError(f"not done: {', '.join(failed)}; see the logs in {args.work}")


def start(job, args):
    """Starts a job in a process of its own.

    It is forked, so that nothing is imported again. That is why this process never touches a GPU.
    """
    print(f"{clock()} {job.title}: begins", flush=True)
    sys.stdout.flush()
    process = multiprocessing.get_context("fork").Process(target=work, args=(job, args))
    process.start()
    return process


def work(job, args):
    """Does what is left of a job's steps, and writes its result: the life of a job's process."""
    os.setsid()  # a terminal's Ctrl-C reaches the first process alone, which passes it on
    signal.signal(signal.SIGINT, signal.default_int_handler)
    signal.signal(signal.SIGTERM, signal.SIG_DFL)
    torch.set_num_threads(1)
    if job.system == DETACHED:
        CLSGen.read_out = detached_read_out

    def all_steps():
        for step in steps_of(job, args):
            if not step.result.exists():
                do_step(job, step, args)
        write_result(job, args)

    folder = job_folder(job, args)
    folder.mkdir(exist_ok=True)
    with open(folder / "log.txt", "a") as log, redirect_stdout(log), redirect_stderr(log):
        code = exit_code(all_steps, "stopped")
    sys.exit(code)


def do_step(job, step, args):
    """Runs one command of a job in this process, and adds what it costs to the job's costs.

    The seconds of a step add up over its parts if it was stopped, except for a part that was
    killed. The peak memory is that of this process so far.
    """
    script, *flags = [str(word) for word in step.resume() or step.command]
    print(f"\n\n{clock()} $ python {shlex.join([script, *flags])}", flush=True)
    costs = read_costs(job, args)
    before = costs.get(step.name, {"seconds": 0.0, "peak_memory_gb": 0.0})
    started = time.perf_counter()
    try:
        SCRIPTS[script](flags)
    finally:
        peak = peak_bytes() / 1e9
        cost = {
            "command": shlex.join(["python", *map(str, step.command)]),
            "commit": commit(),
            "seconds": round(before["seconds"] + time.perf_counter() - started, 1),
            "peak_memory_gb": round(max(before["peak_memory_gb"], peak), 3),
        }
        if args.device != "cpu":
            gpu_peak = torch.cuda.max_memory_allocated() / 1e9
            gpu_before = before.get("peak_gpu_memory_gb", 0.0)
            cost["peak_gpu_memory_gb"] = round(max(gpu_before, gpu_peak), 3)
        costs[step.name] = cost
        write_json(job_folder(job, args) / "costs.json", costs)


def detached_read_out(self, hidden, prompt_end):
    """As CLSGen.read_out, but without a gradient from the score head to LoRA."""
    h_P = states_at(hidden, prompt_end).detach()
    return self.score(h_P.float()).squeeze(-1)


def read_costs(job, args):
    path = job_folder(job, args) / "costs.json"
    return read_json(path) if path.exists() else {}


def clock():
    return time.strftime("%H:%M:%S")


def commit():
    """The commit of the code, with a mark if a tracked file has changed since; "" without git."""
    def git(*words):
        done = subprocess.run(["git", *words], cwd=ROOT, capture_output=True, text=True)
        return done.stdout.strip()

    changed = git("status", "--porcelain", "--untracked-files=no")
    return git("rev-parse", "HEAD") + (" and changes" if changed else "")


# --- the result of a job --------------------------------------------------------------------------
def write_result(job, args):
    """Writes the one file of a job: what was run, what it cost, the metrics, the rows' numbers.

    From these numbers another version of the metrics can be computed without any training.
    """
    result = {
        "data": job.data,
        "system": job.system,
        "seed": job.seed,
        "hardware": hardware(args),
        "versions": versions(),
        "costs": read_costs(job, args),
    }
    if job.system == BASELINES:
        result.update(baseline_numbers(job, args))
    else:
        result.update(model_numbers(job, args))

    lines = []
    for key, value in result.items():
        lines.append(f"{json.dumps(key)}: {json.dumps(value, ensure_ascii=False)}")
    write_atomically(result_path(job, args), "{\n" + ",\n".join(lines) + "\n}\n")


def hardware(args):
    about = {
        "processor": torch.cpu.get_capabilities().get("cpu_name", platform.processor()),
        "cpus": os.cpu_count(),
        "threads": 1,
        "jobs": args.jobs,
    }
    if args.device != "cpu":
        about["gpu"] = torch.cuda.get_device_name(args.device)
    return about


def model_numbers(job, args):
    """The metrics and the rows' numbers of a run, or of the base model."""
    folder = job_folder(job, args)
    report = read_json(folder / "eval" / "eval.json")
    predictions = read_lines(folder / "eval" / "predictions.jsonl")
    numbers = {"metrics": report["metrics"]}

    if job.system == ZERO_SHOT:
        numbers["metrics"] = {}
        for scorer, metrics in report["metrics"].items():
            if scorer.startswith(ZERO_SHOT):  # the others are those of the run that asks
                numbers["metrics"][scorer] = metrics
        predictions = [record for record in predictions if record["run"] == ZERO_SHOT]
    else:
        about = read_json(folder / "run" / "clsgen.json")
        for key in ("scorer", "calibration", "threshold", "base_rate"):
            numbers[key] = about[key]
        numbers["last_validation"] = last_validation(folder / "run")
        for name in ("valid", "unused"):
            if (folder / f"{name}.jsonl").exists():
                numbers[name] = columns(read_lines(folder / f"{name}.jsonl"))

    numbers["test"] = columns(predictions, is_test=True)
    numbers["unseen_groups"] = unseen(job, predictions, args)
    if (folder / "swapped.jsonl").exists():
        swapped = read_lines(folder / "swapped.jsonl")
        numbers["swapped"] = swapped_numbers(predictions, swapped)
    return numbers


def baseline_numbers(job, args):
    """The metrics and the rows' numbers of majority and bags of words."""
    found = read_json(job_folder(job, args) / "tfidf.json")
    train = read_rows(rows_path(job.data, "train", args))
    test = read_rows(rows_path(job.data, "test", args))
    valid = read_rows(rows_path(job.data, "valid", args))
    y = [row["label"] for row in test]
    groups = [row.get("group") for row in test]

    base_rate = float(np.mean([row["label"] for row in train]))
    majority = score_metrics(y, np.full(len(y), base_rate), groups=groups)
    numbers = {"metrics": {"majority": majority, **found["metrics"]}, "base_rate": base_rate}

    rows = {"id": [row["id"] for row in test], "group": groups, "label": y}
    if not any(groups):
        del rows["group"]
    valid_columns = {
        "id": [row["id"] for row in valid],
        "label": [row["label"] for row in valid],
    }
    for scorer, logits in found["logits"].items():
        rows[f"{scorer}: z"] = [round(z, 4) for z in logits["test"]]
        rows[f"{scorer}: calibrated_z"] = [logit(p) for p in logits["p"]]
        valid_columns[f"{scorer}: z"] = [round(z, 4) for z in logits["valid"]]
    return {**numbers, "test": rows, "valid": valid_columns}


def columns(predictions, is_test=False):
    """Records of predictions as {column: a value of each row}.

    z and calibrated_z are the logits of the run's own score before and after calibration, token_z
    those of the label words.
    """
    found = {
        "id": [record["id"] for record in predictions],
        "label": [record["true_label"] for record in predictions],
        "z": [logit(record["raw_probability"]) for record in predictions],
        "token_z": [logit(record["label_token_probability"]) for record in predictions],
    }
    if not is_test:
        return found

    groups = [record["group"] for record in predictions]
    if any(groups):
        found["group"] = groups
    found["calibrated_z"] = [logit(record["probability"]) for record in predictions]
    found["stated"] = [record["stated_label"] for record in predictions]
    # the loss of the reference explanation, a sum over its tokens
    found["nll"] = [round(record["reference_nll"], 3) for record in predictions]
    found["tokens"] = [record["reference_tokens"] for record in predictions]
    return found


def logit(p):
    return round(float(clipped_logit(p, tiny=1e-15)), 4)


def unseen(job, predictions, args):
    """Metrics of the test rows whose group no training or validation row has.

    None if there are no groups, or if all test rows are such rows.
    """
    known = set()
    for split in ("train", "valid"):
        for row in read_rows(rows_path(job.data, split, args)):
            if "group" in row:  # else it is its own group, which no test row has
                known.add(row["group"])
    rows = [record for record in predictions if record["group"] not in known]
    if len(rows) in (0, len(predictions)):
        return None

    y = np.array([record["true_label"] for record in rows])
    p = np.array([record["probability"] for record in rows])
    groups = [record["group"] for record in rows]

    def measure(y, p):
        return score_metrics(y, p, groups=groups)

    return {"n": len(rows), "metrics": none_if_undefined(measure, y, p)}


def swapped_numbers(predictions, swapped):
    """How a run answers to pairs in the other order, with the rows' numbers in file order."""
    numbers = compare(by_id(predictions), by_id(swapped))
    numbers["z"] = [logit(record["raw_probability"]) for record in swapped]
    numbers["stated"] = [record["stated_label"] for record in swapped]
    return numbers


def by_id(records):
    return {record["id"]: record for record in records}


def last_validation(run):
    """What train.py measured on all validation rows after its last step, nothing fitted."""
    validations = [line["valid"] for line in read_lines(run / "log.jsonl") if "valid" in line]
    return validations[-1]


def read_lines(path):
    with open(path, encoding="utf-8") as file:
        return [json.loads(line) for line in file]


# --- arguments ------------------------------------------------------------------------------------
def parse(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("name", nargs="?", choices=SETS, help="one data set")
    add("--all", action="store_true", help="all data sets")
    add("--folder", type=Path, help="has a folder of rows for each data set but the notes")
    add("--model", type=Path, default=Path("models/smollm2-135m"), help="folder of the base")
    add("--jobs", type=int, default=2, help="so many at a time, with one thread each")
    add("--device", default="cpu", help="cpu, or cuda with larger batches")
    add("--work", type=Path, default=Path("runs/real"), help="folder of the runs")
    add("--out", type=Path, default=Path("benchmarks/results"), help="folder of the JSON files")
    args = parser.parse_args(argv)

    if args.all == (args.name is not None):
        raise ValueError("give the name of one data set, or --all")
    if args.name != "notes" and args.folder is None:
        raise ValueError("--folder is missing: the rows of examples/public_data.py")
    if args.jobs < 1:
        raise ValueError(f"--jobs is {args.jobs}, expected 1 or more")
    return args


if __name__ == "__main__":
    run_main(main, when_stopped="stopped; the same command continues")
