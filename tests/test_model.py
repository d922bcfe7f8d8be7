"""The transformer and its loading, against transformers and against what can go wrong on disk."""

import json
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import torch
from conftest import CONFIG, ROOT, shard, write_model
from safetensors.torch import load_file, save_file

from model import LlamaConfig, attend, load_llama

LLAMA3_ROPE = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 1.0,
               "high_freq_factor": 4.0, "original_max_position_embeddings": 64}
VARIANTS = {
    "tied": {},
    "untied": {"tie_word_embeddings": False},
    "one head a group": {"num_key_value_heads": 4},
    "head_dim": {"head_dim": 16},
    "llama3 rope": {"rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE},
    "bias": {"attention_bias": True},
    "mistral window": {"model_type": "mistral", "sliding_window": 7},
    "mistral": {"model_type": "mistral", "sliding_window": None},
    "qwen2": {"model_type": "qwen2", "use_sliding_window": False, "sliding_window": 7},
    "qwen3": {"model_type": "qwen3", "head_dim": 16},
}
GOLDEN, GOLDEN_IDS = ROOT / "tests" / "golden.json", torch.arange(3, 43)[None] * 7 % 400


def reference(folder):
    from transformers import AutoModelForCausalLM

    return AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()


@pytest.mark.parametrize("size, known", [(256, 0), (600, 0), (1, 300), (300, 300)])
def test_attention_by_hand_is_pytorchs(size, known):
    """Fails if a block of 256 queries misses keys that it may see, or sees later ones; if the heads
    of a group get another group's keys; or if the scale or the gradients differ."""
    torch.manual_seed(0)
    q, k, v = (torch.randn(2, heads, n, 8, requires_grad=True)
               for heads, n in ((6, size), (2, known + size), (2, known + size)))
    distance = torch.arange(known, known + size)[:, None] - torch.arange(known + size)
    mask = torch.zeros(1, 1, *distance.shape).masked_fill((distance < 0) | (distance > 400), -9e9)
    found = attend(q, k, v, mask)
    due = torch.nn.functional.scaled_dot_product_attention(q, k, v, mask, enable_gqa=True)
    torch.testing.assert_close(found, due, atol=1e-5, rtol=1e-5)
    weight = torch.randn_like(due)
    for one, other in zip(*(torch.autograd.grad((x * weight).sum(), (q, k, v))
                            for x in (found, due)), strict=True):
        torch.testing.assert_close(one, other, atol=1e-4, rtol=1e-4)


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
            monkeypatch.setattr("model.recomputed", lambda function, *inputs: function(*inputs))
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


@pytest.mark.parametrize("name", ["tied", "untied", "qwen2"])
@torch.no_grad()
def test_packed_weights_give_the_same(name, tmp_path):
    """Fails if packing loses a bias or the output projection, keeps the plain weights, or touches a
    model in float32."""
    write_model(tmp_path, **VARIANTS[name])
    able = torch.cpu.get_capabilities().get("avx512_bf16")
    ids = torch.arange(60).view(3, 20) * 6 + 3
    for dtype in (torch.bfloat16, torch.float32):
        plain, packed = load_llama(tmp_path, dtype), load_llama(tmp_path, dtype).pack()
        due = plain.logits(plain(ids))
        torch.testing.assert_close(packed.logits(packed(ids)), due, atol=0.02 * due.std(), rtol=0)
        left = [key for key in dict(packed.named_parameters()) if "proj" in key or "lm_head" in key]
        assert any(key.endswith(".weight") for key in left) == (dtype == torch.float32 or not able)
        layer = weakref.ref(packed.layers[0].self_attn.q_proj)
        del packed
        assert layer() is None, "no circle of references: a model's memory is free at once"


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


def test_new_spelling_of_rope(tmp_path):
    """Fails if `rope_parameters` of transformers 5 is not read, or read without its theta."""
    new = {**CONFIG, "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500000.0}}
    del new["rope_theta"]
    old = {**CONFIG, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE}
    assert LlamaConfig.from_dict(new) == LlamaConfig.from_dict(old)


@torch.no_grad()
def test_shards_of_the_index_and_nothing_else(tmp_path):
    """Fails if files are found by a glob: the single file left beside the shards is poisoned."""
    write_model(tmp_path)
    whole = load_llama(tmp_path, torch.float32)
    shard(tmp_path)
    path = tmp_path / "model.safetensors"
    save_file({name: t * float("nan") for name, t in load_file(path).items()}, path)
    ids = torch.arange(3, 20)[None]
    assert torch.equal(load_llama(tmp_path, torch.float32)(ids), whole(ids))


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
def test_dtype_on_disk_is_cast(tmp_path, dtype):
    """Fails if the disk's dtype is kept instead of the one asked for."""
    write_model(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = {name: tensor.to(dtype) for name, tensor in load_file(path).items()}
    save_file(tensors, path)
    model = load_llama(tmp_path, torch.bfloat16)
    assert {p.dtype for p in model.parameters()} == {torch.bfloat16}
    due = tensors["model.norm.weight"].to(torch.bfloat16)
    assert torch.equal(model.norm.weight, due)


WATCH_LOADING = """
import re, sys, threading, torch
from model import load_llama

def anonymous():
    return int(re.search(r"RssAnon:\\s+(\\d+)", open("/proc/self/status").read())[1]) * 1024

def watch():
    while not done.wait(0.0005):
        peaks.append(anonymous() - start)

load_llama(sys.argv[1])  # what is imported late does not count
start, peaks, done = anonymous(), [], threading.Event()
thread = threading.Thread(target=watch)
thread.start()
model = load_llama(sys.argv[2])
done.set()
thread.join()
print(max(peaks, default=0) / sum(p.nbytes for p in model.parameters()))
"""


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="needs Linux's /proc")
def test_loading_takes_little_more_than_the_weights(tiny, tmp_path):
    """Fails if two copies of the weights are ever in memory: peak at most 1.1 times their size. In
    a process of its own: in this one, memory that other tests freed would be taken again."""
    write_model(tmp_path, vocab_size=40000, hidden_size=512, intermediate_size=2048)
    done = subprocess.run([sys.executable, "-c", WATCH_LOADING, tiny, tmp_path], cwd=ROOT,
                          capture_output=True, text=True, check=True)
    assert 0.5 < float(done.stdout) < 1.1


BAD_CONFIGS = {
    "model_type": "gemma", "hidden_act": "gelu", "quantization_config": {"bits": 4},
    "rope_scaling": {"rope_type": "yarn", "factor": 2.0}, "hidden_size": "32",
    "rms_norm_eps": None, "num_key_value_heads": 3, "num_hidden_layers": 0, "mlp_bias": True,
    "rope_theta": float("inf"), "layer_types": ["full_attention", "sliding_attention"],
    "vocab_size": True, "head_dim": 7, "intermediate_size": 2**24,
}


@pytest.mark.parametrize("key", BAD_CONFIGS)
def test_unsupported_config_is_refused_by_name(key):
    """Fails if a key that changes the computation is ignored, or the sentence hides which it is."""
    name = "rope_type" if key == "rope_scaling" else key
    with pytest.raises(ValueError, match=name):
        LlamaConfig.from_dict({**CONFIG, key: BAD_CONFIGS[key]})


def test_unknown_config_key_warns_once(capsys):
    """Fails if a new key passes in silence, or a harmless one is complained about."""
    LlamaConfig.from_dict({**CONFIG, "logit_softcap": 30, "torch_dtype": "bfloat16"})
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and "logit_softcap" in error and "torch_dtype" not in error


def break_checkpoint(folder, how):
    path = folder / "model.safetensors"
    tensors = load_file(path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-100])
    elif how == "gone":
        path.unlink()
    elif how == "layers":
        (folder / "config.json").write_text(json.dumps({**CONFIG, "num_hidden_layers": 50}))
    elif how in ("path", "absolute path"):  # to files that are there
        shutil.copy(path, folder.parent / "other.safetensors")
        where, other = shard(folder), folder.parent / "other.safetensors"
        where["model.norm.weight"] = str(other) if how != "path" else "../other.safetensors"
        (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": where}))
    else:
        if how == "integers":
            tensors["model.norm.weight"] = tensors["model.norm.weight"].int()
        if how in ("missing", "all three"):
            del tensors["model.layers.1.mlp.up_proj.weight"]
        if how in ("surplus", "all three"):
            tensors["model.layers.2.mlp.up_proj.weight"] = torch.zeros(48, 32)
        if how in ("shape", "all three"):
            tensors["model.norm.weight"] = torch.zeros(31)
        save_file(tensors, path)


@pytest.mark.parametrize("how, words", [
    ("truncated", ["model.safetensors"]),
    ("gone", ["model.safetensors is missing"]),
    ("layers", ["50 layers, but 20 tensors"]),  # a billion would be built for days
    ("path", ["index.json", "weight_map"]),
    ("absolute path", ["index.json", "weight_map"]),
    ("integers", ["model.norm.weight is stored as I32"]),
    ("missing", ["missing model.layers.1.mlp.up_proj.weight"]),
    ("surplus", ["surplus model.layers.2.mlp.up_proj.weight"]),
    ("shape", ["model.norm.weight is [31], due is [32]"]),
    ("all three", ["missing model", "surplus model", "is [31]"]),
])
def test_broken_checkpoints_are_named(tmp_path, how, words):
    """Fails if a load passes with a tensor missing or renamed, or the error names one of many."""
    write_model(tmp_path / "m")
    break_checkpoint(tmp_path / "m", how)
    with pytest.raises(ValueError) as error:
        load_llama(tmp_path / "m")
    assert all(word in str(error.value) for word in words), error.value


def test_repeated_tied_head_and_old_rotary_tables_are_no_surplus(tmp_path):
    """Fails if published checkpoints that repeat lm_head or store inv_freq are refused."""
    write_model(tmp_path)
    path = tmp_path / "model.safetensors"
    tensors = load_file(path)
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.zeros(4)
    save_file(tensors, path)
    load_llama(tmp_path)


def test_a_folder_without_config(tmp_path):
    """Fails if a partial folder ends in a traceback of another kind."""
    write_model(tmp_path / "m")
    for name in ("config.json", "model.safetensors"):
        shutil.copytree(tmp_path / "m", tmp_path / name)
        (tmp_path / name / name).unlink()
        with pytest.raises(ValueError, match=name):
            load_llama(tmp_path / name)
    with pytest.raises(ValueError, match="nowhere"):
        load_llama(tmp_path / "nowhere")
