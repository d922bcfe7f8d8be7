"""What leaves the project: a merged folder, an adapter of LoRA alone, and their README."""

import json
import re
import shutil
from pathlib import Path

import pytest
import torch
from conftest import greedy_without_cache, near, run_script
from peft import AutoPeftModelForCausalLM
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.processors import TemplateProcessing
from transformers import AutoModelForCausalLM

from clsgen import CLSGen, states_at
from export import main, merge, whole_folder, write_adapter
from prompts import Prompts
from run import Run, load_run


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
    ("--run nowhere --out no/where", "no such folder"), ("--run nowhere --out new", "nowhere"),
    ("--run nowhere --out new --adapter", "nowhere")])
def test_a_wrong_call_says_what_is_wrong(arguments, words):
    """Fails if a mistake ends in a traceback, or a folder that is there is written into."""
    done = run_script("export.py", *arguments.split())
    assert done.returncode == 2 and words in done.stderr and "Traceback" not in done.stderr


@pytest.mark.parametrize("stop", [KeyboardInterrupt, OSError("the disk is full")])
def test_a_stop_leaves_nothing(tmp_path, stop):
    """Fails if half a folder is left, under its own name or the one it has until it is whole."""
    with pytest.raises((KeyboardInterrupt, OSError)), whole_folder(tmp_path / "out") as folder:
        (folder / "half").write_text("x")
        raise stop
    assert not list(tmp_path.iterdir())
    with whole_folder(tmp_path / "out") as folder:
        (folder / "whole").write_text("x")
    assert [path.name for path in tmp_path.rglob("*")] == ["out", "whole"]


@pytest.mark.parametrize("flags", [[], ["--adapter"]])
def test_a_merged_run_is_not_exported_again(run, tmp_path, flags):
    """Fails if a folder without LoRA is written once more as if it had one."""
    merge(run, Path(run.about["base"]), tmp_path / "merged")
    again = ["--run", str(tmp_path / "merged"), "--out", str(tmp_path / "twice")]
    with pytest.raises(ValueError, match="merged already"):
        main([*again, *flags])
    assert not (tmp_path / "twice").exists()


# --- the README of an export ----------------------------------------------------------------------
def code_of(readme, text):
    """The code of a README, for this text."""
    code = "".join(re.findall(
        r"^```python\n(.*?)^```$", readme.read_text(), re.DOTALL | re.MULTILINE))
    assert code.count('text = "..."') == 1
    return code.replace('text = "..."', f"text = {text!r}")


@torch.no_grad()
def test_the_readme_of_a_merged_folder_gives_its_predictions(rows, run, tmp_path, monkeypatch):
    """Fails if the prompt is another one elsewhere, if the head stays random in transformers, if
    the calibration is not the run's, or if the text ends elsewhere."""
    merge(run, Path(run.about["base"]), tmp_path / "merged")
    monkeypatch.chdir(tmp_path / "merged")
    for row in rows[:2]:
        names = {}
        exec(code_of(Path("README.md"), row["text"]), names)
        (record,) = run.predict(row)
        assert names["probability"] == near(record["probability"])
        assert names["decision"] == record["label"]
        ids = names["ids"][0].tolist()
        prompt = run.prompts.prompt(row["text"])[0]
        assert ids == prompt + greedy_without_cache(run, row["text"])
    frame = json.loads(Path("clsgen.json").read_text())["prompt_frame"]
    assert names["prompt"] == frame["before_text"] + row["text"] + frame["after_text"]


@torch.no_grad()
def test_the_readme_of_plain_takes_away_an_end_token(rows, run, tmp_path, monkeypatch):
    """Fails if a tokenizer that appends an end token ends the prompt with it elsewhere."""
    base = shutil.copytree(run.about["base"], tmp_path / "base")
    tokenizer = Tokenizer.from_file(str(base / "tokenizer.json"))
    end = run.prompts.stop_ids[0]
    token = tokenizer.id_to_token(end)
    tokenizer.post_processor = TemplateProcessing(
        single=f"$A {token}", special_tokens=[(token, end)])
    tokenizer.save(str(base / "tokenizer.json"))
    run.prompts = Prompts(base, format="plain", max_prompt=200, max_answer=12)
    merge(run, base, tmp_path / "merged")
    monkeypatch.chdir(tmp_path / "merged")
    names = {}
    exec(code_of(Path("README.md"), rows[0]["text"]), names)
    prompt = run.prompts.prompt(rows[0]["text"])[0]
    assert names["inputs"]["input_ids"][0].tolist() == prompt and end not in prompt
    assert "not the last 1;" in Path("README.md").read_text()


def test_hostile_words_stay_words_in_the_readme(rows, run, tmp_path, monkeypatch):
    """Fails if a question, a label word or a folder's name becomes code or a mark of Markdown."""
    run.prompts.question = "Is it ![x](http://e/x.png) <img src=x>?\n```\nimport os"
    run.prompts.labels = ("no", "yes\nimport no_such_module\n#")
    base = Path(run.about["base"])
    run.about["base"] = "a`b <i>"
    merge(run, base, tmp_path / "merged")
    monkeypatch.chdir(tmp_path / "merged")
    readme = Path("README.md").read_text()
    title = readme.splitlines()[0]
    assert title == (r"# Is it \!\[x\](http://e/x.png) \<img src=x\>? \`\`\` import os")
    assert r"`a\`b" not in readme and r"a\`b \<i\>" in readme
    names = {}
    exec(code_of(Path("README.md"), rows[0]["text"]), names)
    assert 0 < names["probability"] < 1


@pytest.mark.parametrize("why", ["words", "read-out", "family"])
def test_the_readme_offers_no_probability_that_transformers_cannot_compute(
        run, tmp_path, monkeypatch, why):
    """Fails if an untrained head, one that reads another token, or one of a family that
    transformers has no classifier for, is offered all the same."""
    if why == "words":
        run.fitted.scorer = "label_token"
    elif why == "family":
        monkeypatch.setattr("export.NO_CLASSIFIER", ("llama",))
    else:
        monkeypatch.setattr(CLSGen, "read_out", lambda model, hidden, prompt_end: model.score(
            states_at(hidden, prompt_end - 1).float()).squeeze(-1))
    merge(run, Path(run.about["base"]), tmp_path / "merged")
    readme = (tmp_path / "merged" / "README.md").read_text()
    assert "transformers cannot compute it" in readme and "classifier" not in readme


class Pooled(CLSGen):
    """A fork's read-out, with a parameter of its own."""

    def __init__(self, llama):
        super().__init__(llama)
        self.pool = torch.nn.Linear(llama.config.hidden_size, llama.config.hidden_size)

    def read_out(self, hidden, prompt_end):
        return self.score(self.pool(states_at(hidden, prompt_end).float())).squeeze(-1)


@torch.no_grad()
def test_what_another_read_out_has_learned_is_in_a_merged_folder(rows, run, tmp_path, monkeypatch):
    """Fails if the parameters that a fork's read-out has are left behind, or random again."""
    base = Path(run.about["base"])
    model = Pooled(run.model.model)
    model.score = run.model.score
    forked = Run(model, run.prompts, run.fitted)
    forked.about = run.about
    (due,) = forked.predict(rows[0], explain=False)
    monkeypatch.setattr("export.CLSGen", Pooled)
    monkeypatch.setattr("run.CLSGen", Pooled)
    merge(forked, base, tmp_path / "merged")
    (record,) = load_run(tmp_path / "merged").predict(rows[0], explain=False)
    assert record["probability"] == near(due["probability"])


def test_a_merged_folder_of_before_opens(rows, run, tmp_path):
    """Fails if the name that the head's file had earlier is refused."""
    merge(run, Path(run.about["base"]), tmp_path / "merged")
    file = tmp_path / "merged" / "score.safetensors"
    save_file({"base_model.model.score.weight": load_file(file)["score.weight"]}, file)
    (record,) = load_run(tmp_path / "merged").predict(rows[0], explain=False)
    (due,) = run.predict(rows[0], explain=False)
    assert record["probability"] == near(due["probability"])


# --- an adapter for engines -----------------------------------------------------------------------
@torch.no_grad()
def test_an_adapter_without_the_head_writes_the_same_text(rows, run, tmp_path):
    """Fails if a tensor or a setting that vLLM or llama.cpp refuses is in it, or if it is not what
    peft takes for a causal LM's."""
    out = tmp_path / "adapter"
    write_adapter(run, out)
    names = load_file(out / "adapter_model.safetensors").keys()
    assert len(names) == 2 * 7 * 2
    assert all(re.search(r"_proj\.lora_[AB]\.weight$", name) for name in names)
    config = json.loads((out / "adapter_config.json").read_text())
    assert config["task_type"] == "CAUSAL_LM" and config["modules_to_save"] is None

    names = {}
    exec(code_of(out / "README.md", rows[0]["text"]), names)
    ids = run.prompts.tokenizer.encode(names["prompt"], add_special_tokens=False).ids
    due = ids + greedy_without_cache(run, rows[0]["text"])
    for kind in (AutoPeftModelForCausalLM, AutoModelForCausalLM):
        model = kind.from_pretrained(out, dtype=torch.float32)
        written = model.generate(input_ids=torch.tensor([ids]), max_new_tokens=12, do_sample=False)
        assert written[0].tolist() == due
