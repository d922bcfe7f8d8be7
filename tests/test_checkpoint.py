"""A Hugging Face folder to a Llama: dtypes, shards, memory, and what is refused by name."""

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from conftest import (
    CONFIG, ROOT, assert_refused, run_script, shard, write_model, write_tokenizer)
from safetensors.torch import load_file, save_file
from test_model import LLAMA3_ROPE, YARN

from model import FAMILIES
from plumbing.checkpoint import (
    DEFAULT_MODEL, base_fingerprint, base_name, find_base, load_llama, positions_of, read_config)
from plumbing.train_arguments import parse
from prompts import Prompts
from run import load_run

sys.path.insert(0, str(ROOT / "examples"))
import smollm2  # noqa: E402


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
    "rope_scaling": {"rope_type": "longrope", "factor": 2.0}, "hidden_size": "32",
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


@pytest.mark.parametrize("low, high", [(4.0, 4.0), (4.0, 1.0)])
def test_llama3_waves_need_an_order(low, high):
    """Fails if the blend between long and short waves divides by zero or runs backwards."""
    rope = {"rope_type": "llama3", "factor": 8.0, "original_max_position_embeddings": 64}
    read_config({**CONFIG, "rope_scaling": {**rope, "low_freq_factor": 1, "high_freq_factor": 4}})
    with pytest.raises(ValueError, match=f"high_freq_factor is {high}, expected more than"):
        read_config(
            {**CONFIG, "rope_scaling": {**rope, "low_freq_factor": low, "high_freq_factor": high}})


STATED_KEYS = {"embedding_multiplier": 2.0, "residual_multiplier": 2.0, "attention_multiplier": 2.0,
               "logits_scaling": 2.0, "no_rope_layers": [1, 0], "sliding_window": None}


@pytest.mark.parametrize("model_type, key, value", [
    ("granite", "embedding_multiplier", None), ("granite", "residual_multiplier", 0),
    ("granite", "attention_multiplier", "1"), ("granite", "logits_scaling", -8.0),
    ("smollm3", "no_rope_layers", None), ("smollm3", "no_rope_layers", [1]),
    ("smollm3", "no_rope_layers", [1, 2]), ("smollm3", "no_rope_layers", "10"),
    ("internlm3", "qkv_bias", True), ("internlm3", "bias", True), ("iquestcoder", "clip_qkv", 8),
    ("mistral", "sliding_window", 0)])
def test_what_a_family_leaves_to_config_json_is_checked(model_type, key, value):
    """Fails if a missing or senseless value becomes another model, or ends in a traceback."""
    good = {**CONFIG, **STATED_KEYS, "model_type": model_type}
    read_config(good)
    bad = {**good, key: value}
    if value is None:
        del bad[key]
    with pytest.raises(ValueError, match=f"{key} is "):
        read_config(bad)


@pytest.mark.parametrize("model_type", FAMILIES)
def test_what_a_config_leaves_out_is_as_in_transformers(model_type):
    """Fails if a key that a family's configs leave out, as it has its usual value, has another one
    here."""
    from transformers import AutoConfig

    raw = {**CONFIG, **STATED_KEYS, "model_type": model_type}
    del raw["rope_theta"], raw["tie_word_embeddings"], raw["hidden_act"]
    config, theirs = read_config(raw), AutoConfig.for_model(model_type)
    assert config.rope_theta == theirs.rope_parameters["rope_theta"]
    assert config.tie_word_embeddings == theirs.tie_word_embeddings
    assert config.activation == theirs.hidden_act


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


@pytest.mark.parametrize("key", ["quantization_config", "quantization", "compression_config"])
def test_a_quantised_model_is_refused_in_a_short_sentence(key):
    """Fails if the sentence repeats all that is said about quantisation, or if mlx's key passes."""
    about = {"quant_method": "gptq", "bits": 4, "modules": [f"layers.{i}" for i in range(99)]}
    with pytest.raises(ValueError, match=f"^config.json: {key} .* unquantised version") as error:
        read_config({**CONFIG, "model_type": "deepseek", key: about})
    assert len(str(error.value)) < 160
    read_config({**CONFIG, key: None})


def test_a_long_value_is_not_repeated_in_full():
    """Fails if a list of 48 layer types fills the screen."""
    with pytest.raises(ValueError, match=r"layer_types is \['full.* \.\.\., expected a") as error:
        read_config({**CONFIG, "layer_types": ["full_attention"] * 47 + ["linear_attention"]})
    assert len(str(error.value)) < 200


def test_llama_1_names_its_positions_otherwise():
    """Fails if a config of 2023 without max_position_embeddings is refused."""
    old = {**CONFIG, "max_sequence_length": 2048}
    del old["max_position_embeddings"]
    assert read_config(old) == read_config(CONFIG)


@pytest.mark.parametrize("rope, due", [
    (YARN, 2048), (YARN | {"factor": 8.0}, 4096), (YARN | {"factor": float("inf")}, 2048),
    (YARN | {"type": "linear", "factor": 8.0}, 2048), ([], 2048), (None, 2048)])
def test_yarn_makes_room_for_longer_prompts(rope, due):
    """Fails if a user who adds YaRN as a model's card says gets no longer prompts, or if another
    scaling, after which a model is trained on, makes room that is not there."""
    assert positions_of({"max_position_embeddings": 2048, "rope_scaling": rope}) == due


@pytest.mark.parametrize("key, value", [
    ("mscale", 1.0), ("mscale_all_dim", 1.0), ("truncate", False), ("partial_rotary_factor", 0.5),
    ("factor", None), ("factor", "4"), ("beta_fast", -1), ("attention_factor", True),
    ("original_max_position_embeddings", None), ("rope_theta", 1.0)])
@pytest.mark.parametrize("name", ["rope_scaling", "rope_parameters"])
def test_a_part_of_rope_that_is_not_computed_is_refused(name, key, value):
    """Fails if what stands among the numbers of rope is read by nobody, or is no number."""
    rope = {key: value for key, value in {**YARN, key: value}.items() if value is not None}
    with pytest.raises(ValueError, match=f"{key} is "):
        read_config({**CONFIG, name: rope})
    with pytest.raises(ValueError, match=f"{key} is "):
        read_config({**CONFIG, name: {**YARN, key: value}})


def test_unknown_parts_of_rope_warn(capsys):
    """Fails if rope's settings may say anything; or if what changes nothing is complained about."""
    read_config({**CONFIG, "rope_scaling": {**YARN, "finetuned": True, "beta_fast": None}})
    assert capsys.readouterr().err == ""
    read_config({**CONFIG, "rope_scaling": {**YARN, "low_freq_factor": 1}, "beta_slow": 1})
    assert "['beta_slow', 'low_freq_factor']" in capsys.readouterr().err


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
        path.unlink()
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
@pytest.mark.parametrize("stale", [True, False])
def test_one_whole_file_comes_before_an_index(tmp_path, stale):
    """Fails if other weights are loaded than transformers loads where a folder has both: the shards
    that an index names are poisoned, or gone. A run's fingerprint is that of the whole file too."""
    from transformers import AutoModelForCausalLM

    write_model(tmp_path)
    ids = torch.arange(3, 20)[None]
    whole = load_llama(tmp_path, torch.float32)
    due, fingerprint = whole.logits(whole(ids)), fingerprint_of(tmp_path)
    for name in set(shard(tmp_path).values()):
        if stale:
            (tmp_path / name).unlink()
        else:
            tensors = load_file(tmp_path / name)
            save_file({key: tensor * 2 for key, tensor in tensors.items()}, tmp_path / name)
    llama = load_llama(tmp_path, torch.float32)
    assert torch.equal(llama.logits(llama(ids)), due)
    assert fingerprint_of(tmp_path) == fingerprint
    theirs = AutoModelForCausalLM.from_pretrained(tmp_path, dtype=torch.float32)
    torch.testing.assert_close(theirs(ids).logits, due, atol=1e-4, rtol=1e-4)


def fingerprint_of(folder):
    (folder / "tokenizer.json").touch()
    return base_fingerprint(folder)


@torch.no_grad()
def test_shards_of_the_index_and_nothing_else(tmp_path):
    """Fails if files are found by a glob: the file left beside the shards is poisoned."""
    write_model(tmp_path)
    whole = load_llama(tmp_path, torch.float32)
    shard(tmp_path)
    path = tmp_path / "model.safetensors"
    other = tmp_path / "model-00009-of-00009.safetensors"
    save_file({name: t * float("nan") for name, t in load_file(path).items()}, other)
    path.unlink()
    ids = torch.arange(3, 20)[None]
    assert torch.equal(load_llama(tmp_path, torch.float32)(ids), whole(ids))


# --- no model, or none yet ------------------------------------------------------------------------
def test_where_there_is_no_model_a_sentence_says_how_to_get_one(tmp_path, monkeypatch):
    """Fails if the default folder, a hub id, a GGUF file or a run ends in "No such file"."""
    def refused(folder, *words):
        for load in (load_llama, base_fingerprint, Prompts):
            with pytest.raises(ValueError) as error:
                load(folder)
            message = str(error.value)
            assert message.startswith(f"{folder}: ") and "\n" not in message
            assert all(word in message for word in words), message

    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("plumbing.checkpoint.DEFAULT_MODEL", str(tmp_path / "models" / "small"))
    refused("models/small", "python examples/smollm2.py")
    refused(tmp_path / "models" / "small", "python examples/smollm2.py")
    refused("HuggingFaceTB/SmolLM2-135M-Instruct",
            "hf download HuggingFaceTB/SmolLM2-135M-Instruct --local-dir models/SmolLM2-135M-I")
    refused("gpt2", "hf download gpt2 --local-dir models/gpt2")
    refused("Some/Model/", "hf download Some/Model --local-dir models/Model")
    refused("models/other", "no such folder")
    Path("some.gguf").touch()
    refused("some.gguf", "a GGUF file", "from_pretrained('.', gguf_file='some.gguf')")
    Path("ggufs").mkdir()
    Path("ggufs", "x.gguf").touch()
    refused("ggufs", "from_pretrained('ggufs', gguf_file='x.gguf')")
    Path("run").mkdir()
    Path("run", "adapter_config.json").write_text('{"base_model_name_or_path": "models/its"}')
    refused("run", "a run or a LoRA adapter", "its base is 'models/its'")


@pytest.mark.parametrize("script", [
    "data.py ROWS", "train.py --data ROWS", "eval.py --run RUN --data ROWS",
    "explain.py --data ROWS --out OUT"])
def test_every_script_says_the_same_of_a_missing_model(script, run, rows_file, tmp_path):
    """Fails if one of them names a file that is not there, but not what to do about it."""
    names = {"ROWS": rows_file, "OUT": tmp_path / "out", "RUN": tmp_path / "run"}
    arguments = [names.get(word, word) for word in script.split()]
    done = run_script(*arguments, "--model", "Some/Model")
    assert_refused(done, "hf download Some/Model --local-dir models/Model")


def test_the_command_that_converts_a_folder_does(tmp_path):
    """Fails if a folder of PyTorch's own files gets no command, or one that does not work."""
    from transformers import AutoModelForCausalLM

    folder = tmp_path / "m"
    write_model(folder)
    write_tokenizer(folder)
    due = load_llama(folder)
    model = AutoModelForCausalLM.from_pretrained(folder)
    torch.save(model.state_dict(), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError) as error:
        load_llama(folder)
    command = re.search("python -c (\".*\")", str(error.value))[1]
    subprocess.run([sys.executable, "-c", *shlex.split(command)], check=True, capture_output=True)
    assert torch.equal(load_llama(folder / "converted").norm.weight, due.norm.weight)
    assert Prompts(folder / "converted").format == "chatml"

    (folder / "tokenizer.json").rename(folder / "tokenizer.model")
    with pytest.raises(ValueError, match="tokenizer.json is missing; .* python -c"):
        Prompts(folder)


def test_a_base_is_found_from_any_directory(run, tiny, tmp_path, monkeypatch):
    """Fails if the default model is looked for in the working directory, or a run's base is."""
    assert Path(DEFAULT_MODEL) == smollm2.OUT == ROOT / "models" / "smollm2-135m"
    assert parse(["--data", "x"]).model == DEFAULT_MODEL
    assert base_name(DEFAULT_MODEL) == "models/smollm2-135m"
    (tmp_path / "base").mkdir()
    monkeypatch.chdir(tmp_path)
    assert find_base("base") == Path("base")  # as earlier versions stored it
    assert find_base(base_name("base")) == tmp_path / "base"
    monkeypatch.chdir("base")
    assert find_base(base_name("../base")) == tmp_path / "base"
    assert base_name(ROOT / "docs") == "docs" and find_base("docs") == ROOT / "docs"
    assert find_base("nowhere") == Path("nowhere")

    about = tmp_path / "run" / "clsgen.json"
    stored = run.about | {"base": os.path.relpath(tiny, ROOT)}
    about.write_text(json.dumps(stored))
    load_run(tmp_path / "run")


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
