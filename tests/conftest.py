"""What the tests share: a tiny random model with a tokenizer of its own, rows for it, and a way to
run a script as a user does."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

if "PYTEST_XDIST_WORKER" in os.environ:  # several tests at a time, so one thread for each
    os.environ.setdefault("OMP_NUM_THREADS", "1")

import torch
from safetensors.torch import load_file, save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from clsgen import TARGETS, CLSGen, add_lora  # noqa: E402
from model import Llama  # noqa: E402
from plumbing.checkpoint import (  # noqa: E402
    base_fingerprint, disk_name, load_llama, read_config)
from prompts import Prompts  # noqa: E402
from run import Fitted, Run, save_run  # noqa: E402

CONFIG = {
    "model_type": "llama", "hidden_act": "silu", "vocab_size": 400, "hidden_size": 32,
    "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "max_position_embeddings": 2048, "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0, "tie_word_embeddings": True, "bos_token_id": 1, "eos_token_id": 2,
    "pad_token_id": 2,  # pad is eos, as in SmolLM2: nothing may ever look for a pad id
}


def run_script(script, *args, **env):
    """A script of the repository, run from its root with these arguments and environment."""
    command = [sys.executable, *map(str, (ROOT / script, *args))]
    return subprocess.run(command, capture_output=True, text=True, cwd=ROOT, env=os.environ | env)


def assert_refused(done, *words):
    """Exit code 2, nothing printed as a result, and one sentence that has the words."""
    assert done.returncode == 2 and done.stdout == "", done
    assert done.stderr.count("\n") == 1 and "Traceback" not in done.stderr, done.stderr
    assert all(str(word) in done.stderr for word in words), done.stderr


def write_rows(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def write_tokenizer(folder, added=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>")):
    """A byte-level BPE with `added` tokens, as a tokenizer.json. <think> is no special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=396,
        special_tokens=[AddedToken(t, special=t != "<think>", normalized=False) for t in added],
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    corpus = ["Yes. No. Because the risk is high, the patient died.", "Will the patient die? text"]
    tokenizer.train_from_iterator(corpus * 9, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_model(folder, seed=0, **changes):
    """A random model of CONFIG with `changes`, as a Hugging Face folder; returns its config."""
    raw = {**CONFIG, **changes}
    model = Llama(read_config(raw))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that a swapped tensor shows
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = {disk_name(name): p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return raw


def shard(folder):
    """Writes the tensors of a model folder again as two files and an index."""
    tensors = load_file(folder / "model.safetensors")
    names = sorted(tensors)
    where = {name: f"model-{i % 2 + 1:05}-of-00002.safetensors" for i, name in enumerate(names)}
    for file in set(where.values()):
        save_file({n: tensors[n].clone() for n in names if where[n] == file}, folder / file)
    index = {"metadata": {}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return where


def make(folder):
    """A CLSGen whose LoRA and head are random, as after training."""
    torch.manual_seed(0)
    model = CLSGen(add_lora(load_llama(folder, torch.float32), 4, 8.0)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.2)
    return model


def make_run(folder, out, scorer="head"):
    """What train.py would save of such a model, with settings that are not the defaults."""
    fitted = Fitted(scorer, temperature=2.0, bias=0.5, threshold=0.6, base_rate=0.4)
    run = Run(make(folder), Prompts(folder, max_answer=12), fitted)
    out.mkdir()
    save_run(run, out, {
        "base": str(folder), "base_fingerprint": base_fingerprint(folder),
        "lora": {"rank": 4, "alpha": 8.0, "targets": list(TARGETS)}})
    return run


def near(value):
    return pytest.approx(float(value), abs=1e-5)


@torch.no_grad()
def greedy_without_cache(run, text):
    """The token ids of the answer that a run has to write."""
    prompt, answer = run.prompts.prompt(text)[0], []
    while len(answer) < run.prompts.max_answer and not set(answer) & set(run.prompts.stop_ids):
        hidden = run.llama(torch.tensor([prompt + answer]))
        answer.append(int(run.llama.logits(hidden[0, -1]).argmax()))
    return answer


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a tiny random chatml model, with every kind of file that we read."""
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder)
    write_tokenizer(folder)
    shard(folder)
    (folder / "model.safetensors").unlink()
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')
    return folder


@pytest.fixture
def run(tiny, tmp_path):
    """A run on the tiny model, saved in tmp_path / "run"."""
    return make_run(tiny, tmp_path / "run")


@pytest.fixture(scope="session")
def rows():
    """40 rows that a tiny model can learn: "bad" in the text means 1; every fourth has no text."""
    rows = []
    for i in range(40):
        bad = i * 7 % 5 < 2
        text = f"case {i}: the result is {'bad' if bad else 'good'} and the day was {i % 3} long"
        row = {"id": f"r{i}", "text": text, "label": int(bad), "group": f"g{i // 2}"}
        if i % 4:
            good = "The result is good, so the risk is not high."
            row["explanation"] = "It is bad." if bad else good
        rows.append(row)
    return rows


@pytest.fixture(scope="session")
def rows_file(rows, tmp_path_factory):
    return write_rows(tmp_path_factory.mktemp("data") / "rows.jsonl", rows)
