"""A Hugging Face folder to a Llama: dtypes, shards, memory, and what is refused by name."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import CONFIG, ROOT, shard, write_model
from safetensors.torch import load_file, save_file
from test_model import LLAMA3_ROPE

from plumbing.checkpoint import load_llama, read_config



WATCH_LOADING = """
import re, sys, threading, torch
from plumbing.checkpoint import load_llama

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
    "model_type": "unheard_of", "hidden_act": "gelu", "quantization_config": {"bits": 4},
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
        read_config({**CONFIG, key: BAD_CONFIGS[key]})


@pytest.mark.parametrize("value", [48, "full_attention", {"full_attention": 1}, [["full"]]])
def test_layer_types_that_are_no_list_of_names_are_refused(value):
    """Fails if they end in a traceback, or a string is taken for a list of its characters."""
    with pytest.raises(ValueError, match="layer_types"):
        read_config({**CONFIG, "layer_types": value})


def test_unknown_config_key_warns_once(capsys):
    """Fails if a new key passes in silence, or a harmless one is complained about."""
    read_config({**CONFIG, "logit_softcap": 30, "torch_dtype": "bfloat16"})
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
    ("shape", ["model.norm.weight is [31], expected [32]"]),
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


def test_new_spelling_of_rope(tmp_path):
    """Fails if `rope_parameters` of transformers 5 is not read, or read without its theta."""
    new = {**CONFIG, "rope_parameters": {**LLAMA3_ROPE, "rope_theta": 500000.0}}
    del new["rope_theta"]
    old = {**CONFIG, "rope_theta": 500000.0, "rope_scaling": LLAMA3_ROPE}
    assert read_config(new) == read_config(old)


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
