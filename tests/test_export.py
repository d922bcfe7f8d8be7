"""What leaves the project: a merged folder."""

import shutil
from pathlib import Path

import pytest
import torch
from conftest import near, run_script
from transformers import AutoModelForCausalLM

from export import merge
from run import load_run



@torch.no_grad()
def test_a_merged_folder_is_the_same_model(rows, run, tmp_path):
    """Fails if merging misses a projection, scales by alpha alone, or loses the head."""
    due = run.predict(rows[:4])
    merge(run, Path(run.about["base"]), tmp_path / "merged")
    again = load_run(tmp_path / "merged")
    for ours, theirs in zip(due, again.predict(rows[:4]), strict=True):
        assert theirs["raw_probability"] == near(ours["raw_probability"])
        assert theirs["explanation"] == ours["explanation"]
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True, dtype=torch.float32)
    assert not any(info.values())
    ids = torch.arange(3, 30)[None]
    logits = again.llama.logits(again.llama(ids))
    torch.testing.assert_close(theirs(ids).logits, logits, atol=1e-4, rtol=1e-4)


def test_a_merged_folder_has_no_adapter_and_no_stale_index(run, tiny, tmp_path):
    """Fails if peft's file, or an index of other files, comes along from the base: transformers
    would look for an adapter to load on top, and others for the files. A folder in it is left."""
    base = shutil.copytree(tiny, tmp_path / "base")
    (base / "notes.txt").mkdir()
    (base / "adapter_config.json").write_text('{"peft_type": "LORA"}')
    merge(run, base, tmp_path / "shards")
    assert (tmp_path / "shards" / "model.safetensors.index.json").exists()
    AutoModelForCausalLM.from_pretrained(tmp_path / "shards").save_pretrained(base)
    merge(run, base, tmp_path / "merged")
    names = {path.name for path in (tmp_path / "merged").iterdir()}
    assert {"model.safetensors", "score.safetensors", "config.json", "tokenizer.json"} <= names
    assert not {"adapter_config.json", "model.safetensors.index.json"} & names
    AutoModelForCausalLM.from_pretrained(tmp_path / "merged")
    load_run(tmp_path / "merged")


@pytest.mark.parametrize("arguments, words", [
    ("--run nowhere", "--out"), ("--run nowhere --out tests", "tests exists"),
    ("--run nowhere --out no/where", "no such folder"), ("--run nowhere --out new", "nowhere")])
def test_a_wrong_call_says_what_is_wrong(arguments, words):
    """Fails if a mistake ends in a traceback, or a folder that is there is written into."""
    done = run_script("export.py", *arguments.split())
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


def test_a_merged_run_is_not_merged_again(run, tmp_path):
    """Fails if a folder without LoRA is written once more as if it had one."""
    merge(run, Path(run.about["base"]), tmp_path / "merged")
    again = load_run(tmp_path / "merged", pack=False)
    with pytest.raises(ValueError, match="merged already"):
        merge(again, tmp_path / "merged", tmp_path / "twice")
