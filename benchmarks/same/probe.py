"""Asks one tree for results. Runs in that tree, the old or the new: `cd TREE; python probe.py ...`.

    probe.py records OUT RUN ROWS       records of one run, in several ways of predicting
    probe.py families OUT INPUTS ROWS   records of a run of each family, plain and packed
    probe.py golden OUT RUN ...         the golden row of each run folder
    probe.py prompts OUT INPUTS         token ids of all frames
    probe.py configs OUT INPUTS COUNT   what random configs become
    probe.py rows OUT FOLDER            what read_rows makes of random files; random splits
    probe.py speed CASE MODEL REPEATS   CPU seconds of benchmarks/speed.py's work, on stdout

A name is imported from the new file where the tree has it, else from the old one.
"""

import json
import random
import runpy
import sys
import time
from functools import partial
from pathlib import Path

sys.path.insert(0, str(Path.cwd()))


def import_load_run():
    if Path("run.py").exists():
        from run import load_run
    else:
        from clsgen import load_run
    return load_run


def import_prompts():
    if Path("prompts.py").exists():
        from prompts import Prompts
    else:
        from data import Prompts
    return Prompts


def import_read_config():
    if Path("plumbing/checkpoint.py").exists():
        from plumbing.checkpoint import read_config
        return lambda raw: read_config(raw, "config.json")
    from model import LlamaConfig
    if not hasattr(LlamaConfig, "from_dict"):
        raise ImportError("plumbing/checkpoint.py is not there")
    return LlamaConfig.from_dict


# --- predictions ----------------------------------------------------------------------------------
def read_lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


def records(run_folder, rows_path):
    import torch

    from clsgen import choose_token

    load_run = import_load_run()
    rows = read_lines(rows_path)
    sampled = partial(choose_token, temperature=0.8, top_p=0.9,
                      generator=torch.Generator().manual_seed(5))
    plain = load_run(run_folder, dtype="float32", device="cpu", pack=False)
    packed = load_run(run_folder, dtype="float32", device="cpu", pack=True)
    small = load_run(run_folder, dtype="bfloat16", device="cpu", pack=True)
    return {
        "float32": plain.predict(rows),
        "float32 packed": packed.predict(rows),
        "bfloat16 packed": small.predict(rows),
        "head decides": plain.predict(rows, decide="head", batch_size=5),
        "sampled": plain.predict(rows, choose=sampled),
        "probabilities": packed.predict([row["text"] for row in rows], explain=False),
    }


def families(inputs, rows_path):
    load_run = import_load_run()
    rows = read_lines(rows_path)[:12]
    found = {}
    for folder in sorted(Path(inputs, "families").iterdir()):
        for pack in (False, True):
            for dtype in ("float32", "bfloat16"):
                run = load_run(folder / "run", dtype=dtype, device="cpu", pack=pack)
                found[f"{folder.name} {dtype} {'packed' if pack else ''}"] = run.predict(rows)
    return found


def golden(*folders):
    load_run = import_load_run()
    return {folder: load_run(folder, device="cpu", pack=pack).golden()
            for folder in folders for pack in (False, True)}


# --- prompts --------------------------------------------------------------------------------------
TEXTS = [
    "the day was long", "two\n lines\n\n  and 12 blanks", "(é 中", "▁ is no blank", "x", " x ",
    "\n", "\n\nafter two lines", "before two lines\n\n", "a [/INST] b [INST] c", "[INST]", "[/INST",
    "<|im_end|>", "<|im_start|>assistant\nYes.", "<|eot_id|><|begin_of_text|>", "</s><s>",
    "<think>",
    "<<SYS>> x <</SYS>>", "emoji 🙂 and 👩‍⚕️", "e\u0301 is not é", "tab\tand\rreturn",
    "Will it rain?", "12 days, 3.5 mg (0.1 %)", "ÀÉÎ ß ſ İ", "  ", "-", "{user} {system}",
    "中文文本",
    "word " * 40, "é中" * 60, "12 days \n" * 30, "[INST] " * 25, "▁▁" * 30, "Ja. Nein. Yes. No.",
    "\u200b\ufeffhidden", "quote \" and ' and \\ and \\n",
]
ANSWERS = [
    "Yes. Because", "yes, because", "YES: because", " No; because", "No", "no.", "Yes", "Yesterday",
    "Not. at all", "no one", "", " ", "Maybe. Yes.", "Yes.\nBecause", "Yes\n", "No . because",
    "Yes .",
    "noise. no", "yes!", '"Yes." because', "**No**. because", "Answer: yes. because",
    "The answer is no. because", "Ja. weil", "ja: weil", "Jawohl. weil", "jawohl", "Nein, weil",
]
SETTINGS = [
    {}, {"max_prompt": 60}, {"max_prompt": 100, "question": "Will it rain?"}, {"max_prompt": 10},
    {"labels": ("nein", "ja"), "question": "Wird es regnen?", "max_answer": 12},
    {"labels": ("ja", "jawohl")}, {"labels": ("yes", "Yes ")}, {"max_answer": 0},
]
FORMATS = (None, "chatml", "llama3", "mistral", "plain", "llama2", "mistral-v1")


def refused(function, *args):
    """The result, or the exception's kind; a kind of ValueError is ValueError."""
    try:
        return function(*args)
    except ValueError:
        return "ValueError"
    except Exception as error:
        return type(error).__name__


def prompts(inputs):
    Prompts = import_prompts()
    folders = [*sorted(Path(inputs, "tokenizers").iterdir()), Path(inputs, "tiny")]
    found = {}
    for folder in folders:
        for format in FORMATS:
            for settings in SETTINGS:
                name = f"{folder.name} {format} {settings}"
                try:
                    one = Prompts(folder, format=format, **settings)
                except ValueError:
                    found[name] = "refused"
                    continue
                found[name] = {
                    "format": one.format, "stop_ids": one.stop_ids, "label_ids": one.label_ids,
                    "settings": one.settings(), "bounds": [one.max_prompt, one.max_answer],
                    "labels": one.labels, "words": [one.word(0), one.word(1)],
                    "prompt": {text: refused(one.prompt, text) for text in TEXTS},
                    "answer": [one.answer(i % 2, text) for i, text in enumerate(TEXTS)],
                    "parse": {text: one.parse(text) for text in ANSWERS},
                    "decode": one.decode([*one.answer(1, "because é 中"), *one.stop_ids]),
                }
    return found


# --- configs --------------------------------------------------------------------------------------
VALUES = [None, True, False, 0, 1, 2, 3, 7, 8, 64, 100, 2**24 - 1, 2**24, 2**40, -1, -8, 0.0, 0.5,
          1.0, 8.0, 1e-6, 1e300, -0.5, float("nan"), float("inf"), 10**400, "", "8", "silu", "gelu",
          "default", "llama3", [], [1], ["full_attention"], {}, {"type": "linear"}]
KEYS = """vocab_size hidden_size intermediate_size num_hidden_layers num_attention_heads
    num_key_value_heads head_dim max_position_embeddings rms_norm_eps rope_theta rope_scaling
    rope_parameters tie_word_embeddings attention_bias mlp_bias hidden_act attention_dropout
    rope_interleaved partial_rotary_factor quantization_config sliding_window use_sliding_window
    layer_types max_window_layers model_type pretraining_tp architectures num_local_experts
    qkv_bias o_bias qk_norm logit_scale""".split()
FAMILIES = ["llama", "mistral", "qwen2", "qwen3"]
LAYERS = ["full_attention", "sliding_attention"]
ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192}


def mutate(raw, published, rng):
    """Changes one thing of a config in place."""
    kind = rng.choice(["value", "value", "delete", "scale", "scale", "borrow", "family", "rope",
                       "layers"])
    if kind == "value":
        raw[rng.choice(KEYS)] = rng.choice(VALUES)
    elif kind == "delete":
        del raw[rng.choice(list(raw))]
    elif kind == "scale":
        numbers = [key for key, value in raw.items() if type(value) in (int, float)]
        key = rng.choice(numbers or ["hidden_size"])
        value = min(raw[key], 1e12) if numbers else 64  # 10**400 is no float
        raw[key] = rng.choice([value * 2, value // 2, value * 3, value + 1, value - 1, -value,
                               float(value), str(value), value / 2])
    elif kind == "borrow":
        other = rng.choice(published)
        key = rng.choice(list(other))
        raw[key] = other[key]
    elif kind == "family":
        raw["model_type"] = rng.choice(FAMILIES * 3 + ["gemma2", "", None, 3, ["llama"]])
        if rng.random() < 0.5:
            raw["sliding_window"] = rng.choice([None, 8, 4096, 0, "8"])
    elif kind == "layers":
        layers = rng.choices(LAYERS, weights=rng.choice([(1, 0), (0, 1), (1, 1)]), k=3)
        raw["layer_types"] = rng.choice(
            [layers] * 5 + [["other"], [], None, {}, 0, 5, True, "full_attention", [None], [[1]]])
    else:
        rope = dict(ROPE)
        for _ in range(rng.randrange(3)):
            change = rng.choice(["delete", "value", "type", "theta"])
            if change == "delete" and rope:
                del rope[rng.choice(list(rope))]
            elif change == "value":
                rope[rng.choice(list(ROPE))] = rng.choice(VALUES)
            elif change == "type":
                rope["type"] = rng.choice(["default", "llama3", "linear", "dynamic", None])
            elif change == "theta":
                rope["rope_theta"] = rng.choice([10000.0, 500000, 0, None, "1", True])
        raw[rng.choice(["rope_scaling", "rope_parameters"])] = rope


def configs(inputs, count):
    read_config = import_read_config()
    published = json.loads(Path(inputs, "about.json").read_text())["published"]
    rng, found = random.Random(7), []
    for _ in range(int(count)):
        raw = json.loads(json.dumps(rng.choice(published)))
        for _ in range(rng.choice([0, 1, 1, 1, 2, 2, 3])):
            mutate(raw, published, rng)
        warnings = sys.stderr = Warnings()
        try:
            config = vars(read_config(json.loads(json.dumps(raw))))
            found.append({"raw": raw, "config": config, "warned": warnings.text != ""})
        except Exception as error:
            kind = "ValueError" if isinstance(error, ValueError) else type(error).__name__
            found.append({"raw": raw, "kind": kind, "message": str(error)})
        finally:
            sys.stderr = sys.__stderr__
    return found


class Warnings:
    """Takes the place of stderr."""

    def __init__(self):
        self.text = ""

    def write(self, text):
        self.text += text

    def flush(self):
        pass


# --- rows -----------------------------------------------------------------------------------------
FIELDS = ["text", "label", "explanation", "id", "group", "probability", "evidence",
          "explanation_source", "other"]
FIELD_VALUES = [None, True, False, 0, 1, 2, -1, 0.0, 1.0, 0.5, 1e400, float("nan"), "", " ", "x",
                "1", "\ud800", "é 中", [], ["a"], ["a", 1], ["\udfff"], {}, {"a": 1}, "r1", 10**30]
LINES = [b"", b"\n", b"{}", b"[]", b"3", b"null", b"{", b"{'text': 1}", b"\xff\xfe",
         b'{"text": "\xff"}',
         b'{"text": "a", "text": "b", "label": 1}', b'{"text": "a", "label": NaN}',
         b'{"text": "a", "label": 1, "x": {"y": 1, "y": 2}}', b'{"text": "\\ud800", "label": 1}',
         b'{"text": "a", "label": 1}{', b"[" * 5000, b'{"text": "a\tb", "label": 1}',
         b'{"text": "a", "label": 1, "id": "r0"}', b'{"text": "a", "label": 1, "id": 2}']


def random_file(rng):
    """Good rows with some changes, as bytes."""
    lines = []
    for i in range(rng.randrange(1, 16)):
        row = {"text": f"text {i}", "label": i % 2}
        if rng.random() < 0.5:
            row |= {"id": f"r{i}", "group": f"g{i // 2}", "explanation": " because "}
        if rng.random() < 0.1:
            row[rng.choice(FIELDS)] = rng.choice(FIELD_VALUES)
        if rng.random() < 0.03:
            del row["text" if i % 2 else "label"]
        line = json.dumps(row, ensure_ascii=rng.random() < 0.5).encode(errors="surrogatepass")
        if rng.random() < 0.04:
            line = rng.choice(LINES)
        lines.append(line)
    ending = rng.choice([b"\n", b"\n", b"\n", b"\r\n"])
    start = rng.choice([b"", b"", b"", b"\xef\xbb\xbf"])
    return start + ending.join(lines) + rng.choice([b"", b"\n", ending, b"\n\n"])


def rows(folder):
    from data import read_rows, split_valid

    rng, found = random.Random(8), []
    path = Path(folder, "rows.jsonl")
    path.parent.mkdir()
    for _ in range(3000):
        content = random_file(rng)
        path.write_bytes(content)
        labels = rng.random() < 0.8
        try:
            found.append({"file": repr(content[:500]), "rows": read_rows(path, labels=labels)})
        except ValueError as error:
            # "file:line" of each problem; the sentence after it may be another
            places = [line.replace(str(path), "file").split(": ")[0]
                      for line in str(error).splitlines() if line.startswith(str(path))]
            found.append({"file": repr(content[:500]), "places": places,
                          "lines": len(str(error).splitlines())})
    for seed in range(300):
        some = [{"id": i, "text": "x", "label": int(rng.random() < 0.3)} for i in range(40)]
        for row in some:
            if rng.random() < 0.8:
                row["group"] = f"g{rng.randrange(rng.choice([4, 20]))}"
        fraction = rng.choice([0.05, 0.1, 0.2, 0.5, 0.9])
        found.append({"split": refused(split_valid, some, fraction, seed)})
    return found


# --- speed ----------------------------------------------------------------------------------------
def speed(case, model, repeats):
    """benchmarks/speed.py --side ours, with a clock that counts this process's CPU seconds."""
    time.perf_counter = time.process_time
    sys.argv = ["benchmarks/speed.py", "--side", "ours", "--case", case, "--model", model,
                "--dtype", "bfloat16", "--device", "cpu", "--repeats", repeats]
    sys.path.insert(0, str(Path.cwd() / "benchmarks"))
    runpy.run_path("benchmarks/speed.py", run_name="__main__")


def main():
    what, *args = sys.argv[1:]
    if what == "speed":
        return speed(*args)
    function = {"records": records, "families": families, "golden": golden, "prompts": prompts,
                "configs": configs, "rows": rows}[what]
    out, *args = args
    Path(out).write_text(json.dumps(function(*args), default=str))


if __name__ == "__main__":
    main()
