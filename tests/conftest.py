"""What the tests share: a tiny random model with a tokenizer of its own, and rows for it."""

import json
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers, trainers

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from model import Llama, LlamaConfig, disk_name  # noqa: E402

CONFIG = {
    "model_type": "llama",
    "vocab_size": 400,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 2048,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "tie_word_embeddings": True,
    "bos_token_id": 1,
    "eos_token_id": 2,
    "pad_token_id": 2,
    "hidden_act": "silu",
}  # pad is eos, as in SmolLM2: nothing may ever look for a pad id


def write_tokenizer(folder, added=("<|endoftext|>", "<|im_start|>", "<|im_end|>", "<think>")):
    """A byte-level BPE with `added` tokens, as a tokenizer.json. <think> is no special token."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokens = [AddedToken(t, special=t != "<think>", normalized=False) for t in added]
    trainer = trainers.BpeTrainer(
        vocab_size=396,
        special_tokens=tokens,
        show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
    )
    corpus = [
        "Yes. No. Because the risk is high, the patient died.",
        "Will the patient die? text",
    ] * 9
    tokenizer.train_from_iterator(corpus, trainer)
    tokenizer.save(str(folder / "tokenizer.json"))


def write_model(folder, seed=0, **changes):
    """A random model of CONFIG with `changes`, as a Hugging Face folder; returns its config."""
    raw = {**CONFIG, **changes}
    model = Llama(LlamaConfig.from_dict(raw))
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():  # large enough that a swapped tensor shows
            parameter.normal_(1.0 if parameter.dim() == 1 else 0.0, 0.3)
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(raw))
    tensors = {disk_name(name): p.detach().contiguous() for name, p in model.named_parameters()}
    save_file(tensors, folder / "model.safetensors", {"format": "pt"})
    return raw


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    """The folder of a tiny random chatml model."""
    folder = tmp_path_factory.mktemp("tiny")
    write_model(folder)
    write_tokenizer(folder)
    return folder


@pytest.fixture(scope="session")
def rows():
    """40 rows that a tiny model can learn: "bad" in the text means 1; every fourth has no text."""
    rows = []
    for i in range(40):
        bad = i * 7 % 5 < 2
        text = f"case {i}: the result is {'bad' if bad else 'good'} and the day was {i % 3} long"
        row = {"id": f"r{i}", "text": text, "label": int(bad), "group": f"g{i // 2}"}
        if i % 4:
            row["explanation"] = (
                "It is bad." if bad else "The result is good, so the risk is not high."
            )
        rows.append(row)
    return rows


@pytest.fixture(scope="session")
def rows_file(rows, tmp_path_factory):
    path = tmp_path_factory.mktemp("data") / "rows.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path
