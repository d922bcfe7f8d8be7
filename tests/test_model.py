"""The transformer equals transformers' with and without the cache, and keeps little in training."""

import json

import pytest
import torch
from conftest import ROOT, write_model

from plumbing.checkpoint import load_llama



LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
YARN = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 512}


VARIANTS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "one head a group": {"num_key_value_heads": 4},
    "head_dim": {"head_dim": 16},
    "llama3 rope": {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
    "linear rope": {"rope_scaling": {"type": "linear", "factor": 4.0}},
    "dynamic rope": {"rope_scaling": {"rope_type": "dynamic", "factor": 6.0}},
    "yarn": {"head_dim": 16, "rope_scaling": YARN},
    "yarn, all its numbers": {"head_dim": 32, "rope_scaling": {
        **YARN, "beta_fast": 8, "beta_slow": 0.5, "attention_factor": 1.5}},
    "bias": {"attention_bias": True},
    "mistral window": {"model_type": "mistral", "sliding_window": 7},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 7},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
    "seed_oss": {"model_type": "seed_oss", "head_dim": 16, "attention_bias": True,
                 "attention_out_bias": False, "attention_dropout": 0.1, "residual_dropout": 0.1},
    "smollm3": {"model_type": "smollm3", "no_rope_layers": [1, 0], "no_rope_layer_interval": 2},
    "smollm3, yarn": {"model_type": "smollm3", "no_rope_layers": [0, 1], "rope_scaling": YARN},
    "granite": {"model_type": "granite", "embedding_multiplier": 12.0, "residual_multiplier": 0.22,
                "attention_multiplier": 0.015625, "logits_scaling": 8.0},
    "granite, untied": {"model_type": "granite", "embedding_multiplier": 3, "logits_scaling": 0.5,
                        "residual_multiplier": 1.5, "attention_multiplier": 0.5,
                        "tie_word_embeddings": False},
    "internlm3": {"model_type": "internlm3", "head_dim": 16, "tie_word_embeddings": False,
                  "rope_scaling": {"rope_type": "dynamic", "factor": 6.0}},
    "iquestcoder": {"model_type": "iquestcoder", "head_dim": 16, "tie_word_embeddings": False},
}


GOLDEN, GOLDEN_IDS = ROOT / "tests" / "golden.json", torch.arange(3, 43)[None] * 7 % 400


def reference(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("size", [29, 1030])
def test_recomputed_parts_are_not_kept(size, tmp_path, monkeypatch):
    """The same gradients to the bit, from fewer numbers (fails if the float32 of the norms,
    silu(gate) or a long row's probabilities, T x T, wait for the backward pass, or if those of a
    short row do not)."""
    write_model(tmp_path, **VARIANTS["tied"])
    llama, found = load_llama(tmp_path), []
    ids, c = torch.arange(2 * size).view(2, -1) % 100, llama.config
    for again in (True, False):
        if not again:
            for name in ("model.recomputed", "attention.recomputed"):
                monkeypatch.setattr(name, lambda function, *inputs: function(*inputs))
        kept = {}
        with torch.autograd.graph.saved_tensors_hooks(
                lambda x, kept=kept: kept.update({x.data_ptr(): x}) or x, lambda x: x):
            loss = llama(ids).float().square().sum()
        numbers = [x.numel() for x in kept.values()]
        found.append([numbers.count(2 * c.num_attention_heads * min(size, 256) ** 2),
                      numbers.count(2 * size * c.intermediate_size),
                      sum(x.dtype == torch.float32 for x in kept.values())])
        found[-1].append(torch.autograd.grad(loss, llama.parameters()))
    (*few, grads), (*many, plain), layers = *found, c.num_hidden_layers
    assert all(map(torch.equal, grads, plain))
    # the first 256 queries' probabilities; silu(gate); x and its scale, at each of two norms
    assert [more - less for more, less in zip(many, few, strict=True)] == [
        layers * (size > 1024), layers, 4 * layers]


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_logits_equal_transformers_with_and_without_cache(name, tmp_path):
    """Fails if a config value is ignored (theta, eps, window, head_dim, scaling, bias), if pairs of
    neighbours are rotated instead of halves, or if the cache puts a short row's token elsewhere."""
    write_model(tmp_path, **VARIANTS[name])
    model, theirs = load_llama(tmp_path, torch.float32), reference(tmp_path)
    lengths, more = torch.tensor([21, 9, 14]), 6
    ids = torch.randint(3, 400, (3, 27), generator=torch.Generator().manual_seed(1))
    due = [theirs(row[None, : n + more]).logits[0] for row, n in zip(ids, lengths, strict=True)]
    logits = model.logits(model(ids))
    for i, n in enumerate(lengths):
        torch.testing.assert_close(logits[i, : n + more], due[i], atol=1e-4, rtol=1e-4)
    prompts = torch.zeros(3, 21, dtype=torch.long)  # right-padded prompts, then token by token
    for i, n in enumerate(lengths):
        prompts[i, :n] = ids[i, :n]
    cache = model.new_cache(3, 21 + more)
    logits = model.logits(model(prompts, cache))
    for i, n in enumerate(lengths):
        torch.testing.assert_close(logits[i, :n], due[i][:n], atol=1e-4, rtol=1e-4)
    for step in range(more):
        token = ids[torch.arange(3), lengths + step][:, None]
        logits = model.logits(model(token, cache, (lengths + step)[:, None]))
        for i, n in enumerate(lengths):
            torch.testing.assert_close(logits[i, 0], due[i][n + step], atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
@torch.no_grad()
def test_logits_equal_those_on_record(name, tmp_path):
    """Fails as the test above does, without transformers: golden.py wrote the numbers down."""
    write_model(tmp_path, **VARIANTS[name])
    model = load_llama(tmp_path, torch.float32)
    due = torch.tensor(json.loads(GOLDEN.read_text())["logits"][name])
    logits = model.logits(model(GOLDEN_IDS))[0, -1, :8]
    torch.testing.assert_close(logits, due, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("name", VARIANTS)
def test_what_transformers_saves_is_the_same_model(name, tmp_path, capsys):
    """Fails if a key that transformers 5 writes differently is not read, or is complained about."""
    write_model(tmp_path / "published", **VARIANTS[name])
    reference(tmp_path / "published").save_pretrained(tmp_path / "saved")
    capsys.readouterr()
    published, saved = (load_llama(tmp_path / which) for which in ("published", "saved"))
    assert published.config == saved.config
    assert all(map(torch.equal, published.parameters(), saved.parameters()))
    assert capsys.readouterr().err == ""


@pytest.mark.parametrize("name", ["tied", "untied", "granite", "granite, untied"])
@torch.no_grad()
def test_output_rows_make_logits(name, tmp_path):
    """Fails if the score head starts from other rows than the model's own log-odds have, in another
    scale than its logits."""
    write_model(tmp_path, **VARIANTS[name])
    model = load_llama(tmp_path, torch.float32)
    hidden = torch.randn(5, 32)
    due = model.logits(hidden)[:, [7, 3]]
    torch.testing.assert_close(hidden @ model.output_rows([7, 3]).T, due, atol=1e-4, rtol=1e-4)


@torch.no_grad()
def test_long_rows_take_the_other_attention_to_the_same_values(tmp_path):
    """Fails if the hand-written attention of short rows differs from SDPA, which long rows use."""
    write_model(tmp_path, max_position_embeddings=2048)
    model = load_llama(tmp_path, torch.float32)
    ids = torch.randint(3, 400, (1, 1100))
    torch.testing.assert_close(model(ids)[:, :500], model(ids[:, :500]), atol=1e-4, rtol=1e-4)


def test_checkpointing_leaves_gradients_alone(tmp_path):
    """Fails if a recomputed block sees another input than the first time."""
    write_model(tmp_path)
    ids, gradients = torch.randint(3, 400, (2, 12)), []
    for checkpointing in (False, True):
        model = load_llama(tmp_path, torch.float32)
        model.checkpointing = checkpointing
        model(ids).square().sum().backward()
        gradients.append(model.layers[0].mlp.up_proj.weight.grad)
    torch.testing.assert_close(*gradients)
