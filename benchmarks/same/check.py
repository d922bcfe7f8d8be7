"""Does the tree that this file stands in still give the results of the old tree?

    python benchmarks/same/check.py                      # all parts but speed, a few minutes
    python benchmarks/same/check.py configs prompts      # some parts
    python benchmarks/same/check.py speed                # needs models/smollm2-135m (or --model)

The old tree is commit f4210da, unpacked below --work (out/same, which git ignores). Its results are
made once and kept there. Each part prints one line: "the same", "not there yet" (a file of the new
tree is missing), or what differs. Exit code: 0 all the same; 1 something differs; 2 the rest.
"""

import argparse
import fcntl
import hashlib
import json
import math
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from importlib.metadata import version
from pathlib import Path

HERE = Path(__file__).resolve().parent
ROOT = HERE.parents[1]
BASE = "f4210da"
TORCHRUN = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
SHOWN = 3  # differences of a check that are printed; the others are counted
CONFIGS = 40_000


class Missing(Exception):
    """The tree has not got that yet."""


class Failed(Exception):
    """A command of the tree ended in an error."""


# --- running things in a tree ---------------------------------------------------------------------
def environment(threads=1):
    drop = ("PYTHONPATH", "RANK", "WORLD_SIZE")
    kept = {name: value for name, value in os.environ.items() if name not in drop}
    return kept | {"OMP_NUM_THREADS": str(threads), "MKL_NUM_THREADS": str(threads),
                   "CUDA_VISIBLE_DEVICES": "", "TOKENIZERS_PARALLELISM": "false",
                   "PYTHONDONTWRITEBYTECODE": "1", "PYTHONHASHSEED": "0"}


def python(tree, out, *args, threads=1):
    """Runs `python args` with cwd = tree; its output is added to out/log.txt. Returns stdout."""
    command = [sys.executable, *map(str, args)]
    done = subprocess.run(command, cwd=tree, env=environment(threads), capture_output=True,
                          text=True, stdin=subprocess.DEVNULL)
    with open(out / "log.txt", "a") as log:
        log.write(f"$ {' '.join(command)}\n{done.stdout}\n{done.stderr}\nexit code "
                  f"{done.returncode}\n\n")
    if done.returncode:
        raise_error(done.stderr, out)
    return done.stdout


def raise_error(stderr, out):
    """Missing for an import that fails, else Failed, with the error's own line."""
    lines = [line.strip() for line in stderr.splitlines()]
    absent = r"(ModuleNotFoundError|ImportError): |.*: can't open file "
    absent = [line for line in lines if re.match(absent, line)]
    if absent:
        raise Missing(absent[0].split("python: ")[-1])
    errors = [line for line in lines if re.match(r"(\w+\.)*\w*(Error|error|Exception)\b.*:", line)
              and "ChildFailedError" not in line]
    raise Failed(f"{(errors or lines or ['no message'])[-1][:300]} (see {out / 'log.txt'})")


def script(tree, new, old):
    """The command's script: the new file, or in the old tree what did that work there."""
    if (tree / new).exists():
        return [new]
    if (tree / "model.py").exists() and "def from_dict" in (tree / "model.py").read_text():
        return old
    raise Missing(new)


def probe(tree, out, what, *args):
    python(tree, out, HERE / "probe.py", what, out / "found.json", *args)


# --- comparing ------------------------------------------------------------------------------------
def differences(old, new, where=""):
    """Yields a sentence for each place in which two JSON values differ; 1, 1.0 and true differ."""
    if isinstance(old, dict) and isinstance(new, dict):
        for key in [*old, *(key for key in new if key not in old)]:
            here = f"{where}.{key}" if where else str(key)
            if key not in new:
                yield f"{here} is gone, was {short(old[key])}"
            elif key not in old:
                yield f"{here} is new, {short(new[key])}"
            else:
                yield from differences(old[key], new[key], here)
    elif isinstance(old, list) and isinstance(new, list):
        if len(old) != len(new):
            yield f"{where} has {len(new)} entries, had {len(old)}"
        for i, pair in enumerate(zip(old, new, strict=False)):
            yield from differences(*pair, f"{where}[{i}]")
    elif type(old) is not type(new) or (old != new and not (is_nan(old) and is_nan(new))):
        yield f"{where} is {short(new)}, was {short(old)}"


def is_nan(value):
    return isinstance(value, float) and math.isnan(value)


def short(value):
    text = json.dumps(value, ensure_ascii=False)
    return text if len(text) <= 100 else text[:97] + "..."


def read(path):
    if not path.exists():
        raise Failed(f"{path} was not written")
    return json.loads(path.read_text())


def read_lines(path):
    if not path.exists():
        raise Failed(f"{path} was not written")
    return [json.loads(line) for line in path.read_text().splitlines()]


def same_found(old, new):
    return list(differences(read(old / "found.json"), read(new / "found.json")))


def same_bytes(old, new):
    """[] or what differs between two files."""
    if not old.exists() or not new.exists():
        gone = old if not old.exists() else new
        return [f"{gone} was not written"]
    if old.read_bytes() == new.read_bytes():
        return []
    if old.suffix == ".safetensors":
        return same_tensors(old, new)
    try:
        old_text, new_text = old.read_text(), new.read_text()
    except UnicodeDecodeError:
        return [f"{new.name}: other bytes"]
    pairs = zip(old_text.splitlines(), new_text.splitlines(), strict=False)
    for number, (a, b) in enumerate(pairs, 1):
        if a != b:
            return [f"{new.name}:{number} is {short(b)}, was {short(a)}"]
    return [f"{new.name}: {len(new_text)} characters, was {len(old_text)}"]


def same_tensors(old, new):
    from safetensors.torch import load_file

    import torch

    a, b = load_file(old), load_file(new)
    if a.keys() != b.keys():
        return [f"{new.name}: tensors that one of them has: {sorted(a.keys() ^ b.keys())[:3]}"]
    found = []
    for name in a:
        if a[name].shape != b[name].shape or a[name].dtype != b[name].dtype:
            found.append(f"{new.name}: {name} is {b[name].dtype} {list(b[name].shape)}, was "
                         f"{a[name].dtype} {list(a[name].shape)}")
        elif not torch.equal(*(one[name].flatten().view(torch.uint8) for one in (a, b))):
            worst = (a[name].double() - b[name].double()).abs().max().item()
            found.append(f"{new.name}: {name} differs by up to {worst:.2e}")
    return found or [f"{new.name}: the same tensors, but another header or order"]


# --- train ----------------------------------------------------------------------------------------
TRAIN = "--device cpu --rank 4 --alpha 8 --batch 8 --micro-batch 4 --lr 0.01 --seed 3" \
        " --max-prompt 190 --max-answer 110".split()
PATH_KEYS = {"data", "valid", "model", "init_adapter", "out", "versions"}


def train(module, flags):
    """A check: one training by each tree."""
    def produce(c, tree, out):
        filled = [part.format(inputs=c.inputs) for part in flags.split()]
        python(tree, out, *module, "train.py", *TRAIN, "--out", out / "run", *filled)
    return produce, compare_training


def compare_training(c, old, new):
    return compare_runs(old / "run", new / "run")


def compare_runs(old, new):
    found = same_bytes(old / "adapter_model.safetensors", new / "adapter_model.safetensors")
    found += same_bytes(old / "adapter_config.json", new / "adapter_config.json")
    found += same_log(read_lines(old / "log.jsonl"), read_lines(new / "log.jsonl"))
    about = [read(folder / "clsgen.json") for folder in (old, new)]
    for one in about:
        one.pop("versions", None)
    found += [f"clsgen.json: {text}" for text in differences(*about)]
    return found


def same_log(old, new):
    """log.jsonl line by line, without `seconds`, the versions, and what names a path."""
    for line in old + new:
        line.pop("seconds", None)
        for key in list(line.get("config", ())):
            if key in PATH_KEYS or key.startswith("sha256 of"):
                del line["config"][key]
    return list(differences(old, new, "log.jsonl"))


JOINT = "--model {inputs}/tiny --data {inputs}/train.jsonl --epochs 2"
TRAININGS = {
    "joint": train([], f"{JOINT} --dtype float32 --epochs 40 --rank 16 --lr 0.02"
                       " --valid-every 100"),
    "classifier": train([], f"{JOINT} --dtype float32 --lm-weight 0 --epochs 6"
                            " --valid {inputs}/valid.jsonl"),
    "best": train([], f"{JOINT} --dtype float32 --epochs 8 --keep-best --valid-every 12"
                      " --targets v_proj q_proj down_proj --valid {inputs}/valid.jsonl"),
    "bfloat16": train([], f"{JOINT} --dtype bfloat16"),
    "two-processes": train(TORCHRUN, f"{JOINT} --dtype float32"),
    "window": train([], "--model {inputs}/window --data {inputs}/full.jsonl --epochs 2"
                        " --dtype float32 --cls-weight 0 --checkpointing"
                        " --init-adapter {inputs}/families/mistral-window/run"),
}


# --- predict and eval -----------------------------------------------------------------------------
def records(name):
    def produce(c, tree, out):
        probe(tree, out, "records", c.old_run(name), c.inputs / "test.jsonl")
    return produce, lambda c, old, new: same_found(old, new)


def families(c, tree, out):
    probe(tree, out, "families", c.inputs, c.inputs / "test.jsonl")


def predict_command(c, tree, out):
    command = [*script(tree, "predict.py", ["clsgen.py"]), "--run", c.old_run("joint"), "--device",
               "cpu", "--data", c.inputs / "test.jsonl"]
    python(tree, out, *command, "--out", out / "plain.jsonl")
    drawn = "--decide head --temperature 0.8 --top-p 0.9 --seed 4 --batch 3".split()
    python(tree, out, *command, "--out", out / "drawn.jsonl", *drawn)


def evaluate(flags):
    def produce(c, tree, out):
        python(tree, out, "eval.py", "--device", "cpu", "--draws", 50, "--out", out / "eval",
               *[str(c.old_run(part[1:])) if part[0] == "@" else part.format(inputs=c.inputs)
                 for part in flags.split()])
    return produce, compare_eval


def compare_eval(c, old, new):
    found = []
    names = ("metrics", "n", "positives", "groups", "bayes_auroc")
    reports = [read(folder / "eval" / "eval.json") for folder in (old, new)]
    for report in reports:
        for metrics in report["metrics"].values():
            metrics.pop("seconds", None)
    wanted = [{name: report.get(name) for name in names} for report in reports]
    found += [f"eval.json: {text}" for text in differences(*wanted)]
    lines = [read_lines(folder / "eval" / "predictions.jsonl") for folder in (old, new)]
    found += differences(*lines, "predictions.jsonl")
    if not found:
        found += same_bytes(*(folder / "eval" / "predictions.jsonl" for folder in (old, new)))
    return found


def same_files(*names):
    def compare(c, old, new):
        return [text for name in names for text in same_bytes(old / name, new / name)]
    return compare


# --- prompts and configs --------------------------------------------------------------------------
def prompts(c, tree, out):
    probe(tree, out, "prompts", c.inputs)


def configs(c, tree, out):
    probe(tree, out, "configs", c.inputs, CONFIGS)


def compare_configs(c, old, new):
    found, accepted, refused, other_keys, warnings, examples = [], 0, 0, 0, 0, []
    pairs = zip(read(old / "found.json"), read(new / "found.json"), strict=True)
    for i, (a, b) in enumerate(pairs):
        if json.dumps(a["raw"]) != json.dumps(b["raw"]):
            return [f"config {i} is not the same in both trees: mend probe.py"]
        if "config" in a and "config" in b:
            accepted += 1
            # the number types may differ: 1 and 1.0 compute the same
            wrong = [f"{key} is {short(b['config'].get(key, 'gone'))}, was {short(value)}"
                     for key, value in a["config"].items() if b["config"].get(key, "gone") != value]
            warnings += a["warned"] != b["warned"]
            found += [f"{text}: {describe(a['raw'])}" for text in wrong[:1]]
        elif "config" in a:
            found.append(f"refused with {b['kind']} ({b['message'][:150]}), was accepted: "
                         f"{describe(a['raw'])}")
        elif "config" in b:
            found.append(f"accepted, was refused ({a['message'][:150]}): {describe(a['raw'])}")
        else:
            refused += 1
            if b["kind"] != "ValueError" and c.new_style:
                found.append(f"{b['kind']} ({b['message'][:100]}), ValueError is expected: "
                             f"{describe(a['raw'])}")
            keys = [re.match(r"config\.json: (\w+)", one["message"]) for one in (a, b)]
            keys = [match and match[1] for match in keys]
            if a["kind"] == "ValueError" and keys[0] != keys[1]:
                other_keys += 1
                examples.append(f"{a['message'][:70]!r} -> {b['message'][:70]!r}")
    c.notes.append(f"{accepted} accepted and {refused} refused by both; {other_keys} messages name "
                   f"another key; {warnings} differ in a warning")
    c.notes += examples[:3]
    return found


def describe(raw):
    """The keys of a config that decide most, to find it again."""
    names = ("architectures", "torch_dtype", "transformers_version", "initializer_range",
             "use_cache", "bos_token_id", "eos_token_id", "pretraining_tp")
    return json.dumps({key: value for key, value in raw.items() if key not in names})[:700]


# --- rows and explanations ------------------------------------------------------------------------
def explain(c, tree, out):
    """A trained run, merged by the old tree, as the teacher of rows without an explanation."""
    own = "__main__" in (tree / "explain.py").read_text()
    command = ["explain.py"] if own else script(tree, "no such file", ["data.py", "explain"])
    teacher = c.old / "results" / "export" / "joint" / "merged"
    flags = "--words 1 80 --grounded 0 --temperature 0.1 --tries 3 --batch 4 --dtype float32"
    python(tree, out, *command, "--model", teacher, "--data", c.inputs / "train.jsonl", "--out",
           out / "rows.jsonl", "--max-answer", 110, *flags.split())


def compare_explained(c, old, new):
    sides = [read_lines(side / "rows.jsonl") for side in (old, new)]
    for row in sides[0] + sides[1]:  # a hash over the names of all arguments
        row.get("explanation_source", {}).pop("arguments", None)
    return list(differences(*sides, "rows"))


def rows(c, tree, out):
    probe(tree, out, "rows", out / "files")


def compare_rows(c, old, new):
    a, b = (read(side / "found.json") for side in (old, new))
    kinds = [sum(kind in one for one in a) for kind in ("rows", "places", "split")]
    c.notes.append(f"{kinds[0]} files accepted, {kinds[1]} refused; {kinds[2]} splits")
    return list(differences(a, b))


# --- folders --------------------------------------------------------------------------------------
def export(name):
    def produce(c, tree, out):
        command = script(tree, "export.py", ["clsgen.py", "merge"])
        python(tree, out, *command, "--run", c.old_run(name), "--out", out / "merged")

    def compare(c, old, new):
        found, sides = [], [old / "merged", new / "merged"]
        names = sorted({path.name for side in sides if side.exists() for path in side.iterdir()})
        for name in names:
            if name != "clsgen.json":
                found += same_bytes(sides[0] / name, sides[1] / name)
        about = [read(side / "clsgen.json") for side in sides]
        for one in about:
            one.pop("base"), one.pop("versions", None)
        return found + [f"clsgen.json: {text}" for text in differences(*about)]
    return produce, compare


def golden(c, tree, out):
    runs = [c.old_run(name) for name in TRAININGS]
    merged = [c.old / "results" / "export" / name / "merged" for name in EXPORTS]
    families = [folder / "run" for folder in sorted((c.inputs / "families").iterdir())]
    probe(tree, out, "golden", *runs, *merged, *families)


LONG = "--model {inputs}/tiny --data {inputs}/train.jsonl --dtype float32 --epochs 20" \
       " --valid-every 8 --keep-best --save-every 1000 --lr 0.1"


def resume(c, tree, out):
    """The old side: a whole training, and one that is stopped. The new side goes on with that."""
    stopped = c.old / "results" / "folders" / "resume" / "stopped"
    if out == stopped.parent:
        flags = [*TRAIN, *(part.format(inputs=c.inputs) for part in LONG.split())]
        python(tree, out, "train.py", *flags, "--out", out / "whole")
        stop_training(tree, out, ["train.py", *flags, "--out", stopped], stopped)
    shutil.copytree(stopped, out / "resumed")
    python(tree, out, "train.py", "--resume", out / "resumed")


def stop_training(tree, out, command, folder, after=45):
    """Starts a training and sends SIGINT after some lines of its log (past the best step, 32)."""
    with open(out / "stopped.txt", "w") as log:
        process = subprocess.Popen([sys.executable, *map(str, command)], cwd=tree, stdout=log,
                                   stderr=log, env=environment())
        file, begin = folder / "log.jsonl", time.monotonic()
        while process.poll() is None and time.monotonic() < begin + 120:
            if file.exists() and file.read_bytes().count(b"\n") > after:
                process.send_signal(signal.SIGINT)
                break
            time.sleep(0.01)
        try:
            code = process.wait(60)
        except subprocess.TimeoutExpired:
            process.kill()
            raise Failed("the training did not stop") from None
    if code != 130 or not (folder / "resume").exists() or (folder / "clsgen.json").exists():
        raise Failed(f"not stopped in the middle: exit code {code}, see {log.name}")


def compare_resumed(c, old, new):
    return compare_runs(old / "whole", new / "resumed")


# --- the parts ------------------------------------------------------------------------------------
EXPORTS = {name: export(name) for name in ("joint", "bfloat16", "window")}
PARTS = {  # part: {check: (produce(c, tree, out), compare(c, old out, new out))}
    "train": TRAININGS,
    "export": EXPORTS,  # before folders, which loads what the old tree merged
    "predict": {
        "records": records("joint"),
        "records-label-token": records("window"),
        "families": (families, lambda c, old, new: same_found(old, new)),
        "command": (predict_command, same_files("plain.jsonl", "drawn.jsonl")),
    },
    "eval": {
        "runs": evaluate("--run @classifier --run @joint --model {inputs}/tiny"
                         " --data {inputs}/many.jsonl"),
        "part": evaluate("--run @joint --run @best --model {inputs}/tiny --rows 34 --explain 9"
                         " --data {inputs}/test.jsonl"
                         " --valid {inputs}/valid.jsonl --batch 5 --seed 2"),
        "one": evaluate("--run @window --dtype bfloat16 --data {inputs}/test.jsonl"),
    },
    "prompts": {"ids": (prompts, lambda c, old, new: same_found(old, new))},
    "configs": {"random": (configs, compare_configs)},
    "rows": {"random": (rows, compare_rows)},
    "explain": {"local": (explain, compare_explained)},
    "folders": {
        "golden": (golden, lambda c, old, new: same_found(old, new)),
        "resume": (resume, compare_resumed),
    },
}
NEEDS = {"predict": ["train"], "eval": ["train"], "export": ["train"],
         "explain": ["train", "export"], "folders": ["train", "export"]}


class Comparison:
    """The two trees, the inputs, and where results go."""

    def __init__(self, work, new):
        self.work, self.new, self.notes = work, new, []
        self.new_style = (new / "plumbing").is_dir()
        self.old = work / "old"
        self.old_tree = self.old / "tree"
        self.inputs = self.old / "inputs"

    def old_run(self, name):
        return self.old / "results" / "train" / name / "run"

    def prepare(self):
        """The old tree and the inputs; made anew when this harness or torch is another."""
        stamp = BASE + "".join(version(name) for name in ("torch", "numpy", "tokenizers"))
        for path in sorted(HERE.glob("*.py")):
            stamp += hashlib.sha256(path.read_bytes()).hexdigest()
        file = self.old / "stamp"
        if not file.exists() or file.read_text() != stamp:
            shutil.rmtree(self.old, ignore_errors=True)
            self.old_tree.mkdir(parents=True)
            tar = subprocess.run(["git", "-C", ROOT, "archive", BASE], capture_output=True)
            if tar.returncode:
                sys.exit(f"error: git archive {BASE}: {tar.stderr.decode().strip()}")
            subprocess.run(["tar", "-x", "-C", self.old_tree], input=tar.stdout, check=True)
            file.write_text(stamp)
        if not (self.old / "inputs.done").exists():
            shutil.rmtree(self.inputs, ignore_errors=True)
            python(self.old_tree, self.old, HERE / "inputs.py", self.inputs)
            (self.old / "inputs.done").touch()

    def make_old(self, part, jobs):
        """Results of the old tree for a part, unless they are there."""
        for other in NEEDS.get(part, ()):
            self.make_old(other, jobs)

        def one(check):
            out = self.old / "results" / part / check
            if not (out / "done").exists():
                shutil.rmtree(out, ignore_errors=True)
                out.mkdir(parents=True)
                PARTS[part][check][0](self, self.old_tree, out)
                (out / "done").touch()

        with ThreadPoolExecutor(jobs) as pool:
            list(pool.map(one, PARTS[part]))

    def make_new(self, part, jobs):
        """Results of the new tree: {check: None, Missing or Failed}."""
        def one(check):
            out = self.work / "new" / part / check
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir(parents=True)
            try:
                PARTS[part][check][0](self, self.new, out)
            except (Missing, Failed) as error:
                return error

        with ThreadPoolExecutor(jobs) as pool:
            return dict(zip(PARTS[part], pool.map(one, PARTS[part]), strict=True))

    def compare(self, part, errors):
        """({what is missing: checks}, the lines on differences) of a part."""
        missing, lines = {}, []
        for check, (_, compare) in PARTS[part].items():
            error = errors[check]
            if isinstance(error, Missing):
                missing.setdefault(str(error), []).append(check)
                continue
            try:
                found = [f"fails: {error}"] if error else compare(
                    self, self.old / "results" / part / check, self.work / "new" / part / check)
            except Failed as wrong:
                found = [str(wrong)]
            lines += [f"{check}: {text}" for text in found[:SHOWN]]
            if len(found) > SHOWN:
                lines.append(f"{check}: and {len(found) - SHOWN} more differences")
        return missing, lines


def check_part(c, part, jobs):
    """Prints a part's line; returns its exit code."""
    c.notes = []
    begin = time.monotonic()
    c.make_old(part, jobs)
    middle = time.monotonic()
    errors = c.make_new(part, jobs)
    missing, lines = c.compare(part, errors)
    took = f"{time.monotonic() - middle:.0f} s"
    if middle - begin > 1:
        took += f", and {middle - begin:.0f} s for the old tree"

    verdict = "differs" if lines else "not there yet" if missing else "the same"
    print(f"{part:8} {verdict}  ({len(PARTS[part])} checks, {took})")
    for text in lines:
        print(f"           {text}")
    for text, checks in missing.items():
        print(f"           not there yet: {', '.join(checks)}: {text}")
    for note in c.notes:
        print(f"           note: {note}")
    sys.stdout.flush()
    return 1 if lines else 2 if missing else 0


# --- speed ----------------------------------------------------------------------------------------
CASES = {"train/4x512": 4, "probability/discharge": 4, "explain/1": 6, "explain/32": 2}  # repeats


def check_speed(c, args):
    """CPU seconds (user and system) of the same work, old and new in turns."""
    if not (args.model / "config.json").exists():
        print(f"speed    not measured: no model in {args.model}; --model can name one")
        return 0
    out, code = c.work / "new" / "speed", 0
    out.mkdir(parents=True, exist_ok=True)
    for case in args.cases:
        ratios = {"work": [], "process": []}
        shown = []
        for _ in range(args.rounds):
            work, process = [], []
            for tree in (c.old_tree, c.new):
                before = os.times()
                try:
                    text = python(tree, out, HERE / "probe.py", "speed", case, args.model.resolve(),
                                  args.repeats or CASES[case], threads=args.threads)
                except (Missing, Failed) as error:
                    kind = "not there yet" if isinstance(error, Missing) else "fails"
                    print(f"speed    {case}: {kind}: {error}")
                    return 2 if isinstance(error, Missing) else 1
                after = os.times()
                work.append(min(json.loads(text.splitlines()[-1])["seconds"]))  # the least noise
                process.append(after.children_user + after.children_system
                               - before.children_user - before.children_system)
            ratios["work"].append(work[1] / work[0])
            ratios["process"].append(process[1] / process[0])
            shown.append(f"{work[0]:.2f} -> {work[1]:.2f}")
        middle = statistics.median(ratios["work"])
        slower = middle > args.slower
        print(f"speed    {case}: {'SLOWER' if slower else 'as fast'}, new / old CPU time "
              f"{middle:.3f} ({', '.join(f'{ratio:.3f}' for ratio in ratios['work'])}; seconds "
              f"{', '.join(shown)}; whole process {statistics.median(ratios['process']):.3f})",
              flush=True)
        code = max(code, int(slower))
    return code


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    add = parser.add_argument
    add("part", nargs="*", help=f"{', '.join(PARTS)}, speed (default: all but speed)")
    add("--new", type=Path, default=ROOT, help="the tree to check (default: this one)")
    add("--work", type=Path, default=ROOT / "out" / "same", help="old tree, inputs, results")
    add("--jobs", type=int, default=2, help="processes at a time")
    add("--fresh", action="store_true", help="make the old tree's results again")
    add("--model", type=Path, help="for speed (default: models/smollm2-135m of the new tree)")
    add("--cases", nargs="+", choices=CASES, default=list(CASES), help="for speed")
    add("--rounds", type=int, default=3, help="for speed: old and new, so many times")
    add("--repeats", type=int, help="for speed: of the work in one process")
    add("--threads", type=int, default=1, help="for speed: of torch")
    add("--slower", type=float, default=1.05, help="for speed: a median ratio above this differs")
    args = parser.parse_args()
    parts = args.part or list(PARTS)
    if unknown := set(parts) - {*PARTS, "speed"}:
        parser.error(f"no such part: {', '.join(sorted(unknown))}")
    args.model = args.model or args.new / "models" / "smollm2-135m"

    os.nice(10)
    work = args.work.resolve()
    work.mkdir(parents=True, exist_ok=True)
    with open(work / "lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)  # another check in this folder has to end first
        c = Comparison(work, args.new.resolve())
        if args.fresh:
            shutil.rmtree(c.old, ignore_errors=True)
        c.prepare()
        codes = [check_speed(c, args) if part == "speed" else check_part(c, part, args.jobs)
                 for part in parts]
    sys.exit(1 if 1 in codes else max(codes))


if __name__ == "__main__":
    main()
