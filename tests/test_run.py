"""Run folders: what they hold, what they refuse, and that peft opens them."""

import json
import re
import shutil

import numpy as np
import pytest
import torch
from conftest import near
from peft import PeftModel
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from clsgen import TARGETS, CLSGen, states_at
from run import Fitted, fit, load_run, nll_and_kl, save_run

HEAD = "base_model.model.score.weight"



def test_a_run_opens_with_the_same_predictions(rows, run, tmp_path):
    """Fails if a file of the run folder leaves out calibration, threshold, settings or the head."""
    ours, theirs = run.predict(rows[:4]), load_run(tmp_path / "run").predict(rows[:4])
    assert [r | {"run": ""} for r in ours] == [r | {"run": ""} for r in theirs]
    assert len(theirs[0]["run"]) == 12


def test_the_adapter_holds_exactly_lora_and_head(run, tmp_path):
    """Fails if a base weight is saved, the head is not, or a name is not peft's."""
    parts = {target: "mlp" if target in TARGETS[4:] else "self_attn" for target in TARGETS}
    due = {f"base_model.model.model.layers.{layer}.{part}.{target}.lora_{ab}.weight"
           for layer in range(2) for target, part in parts.items() for ab in "AB"}
    assert load_file(tmp_path / "run" / "adapter_model.safetensors").keys() == due | {HEAD}


@torch.no_grad()
def test_peft_opens_a_run_with_the_same_logit_and_the_same_text(tiny, rows, run, tmp_path):
    """Fails if adapter_config.json is not peft's layout, or the head goes by another name there."""
    classifier = AutoModelForSequenceClassification.from_pretrained(
        tiny, num_labels=1, dtype=torch.float32)
    lm = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    classifier, lm = (PeftModel.from_pretrained(base, tmp_path / "run").eval()
                      for base in (classifier, lm))
    for row, record in zip(rows[:3], run.predict(rows[:3]), strict=True):
        ids = torch.tensor([run.prompts.prompt(row["text"])[0]])
        assert record["raw_probability"] == near(classifier(input_ids=ids).logits.sigmoid())
        text = lm.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        answer = run.prompts.decode(text.tolist())
        assert run.prompts.parse(answer) == (record["stated_label"], record["explanation"])


@pytest.mark.parametrize("how, words", [
    ("random head", "made-up hidden states"), ("no head", f"missing {HEAD}"),
    ("truncated", "adapter_model.safetensors"),
    ("base weights", "fixed sentence"),  # names and shapes agree, so the fingerprint cannot tell
    ("base config", "not the base of"),
])
def test_a_run_that_does_not_fit_is_refused(run, tmp_path, how, words):
    """Fails if a wrong base, a random head or a cut file gives predictions all the same."""
    path, base = tmp_path / "run" / "adapter_model.safetensors", None
    tensors = load_file(path)
    if how == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    elif how == "random head":
        save_file(tensors | {HEAD: torch.randn(1, 32)}, path)
    elif how == "no head":
        save_file({name: tensor for name, tensor in tensors.items() if name != HEAD}, path)
    else:
        base = shutil.copytree(run.about["base"], tmp_path / "other")
        config = json.loads((base / "config.json").read_text())
        for file in base.glob("*.safetensors") if how == "base weights" else ():
            save_file({name: 0.9 * tensor for name, tensor in load_file(file).items()}, file)
        if how == "base config":
            (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    with pytest.raises(ValueError, match=words):
        load_run(tmp_path / "run", model=base)


@pytest.mark.parametrize("change", [
    {"golden": None}, {"threshold": "x"}, {"lora": {}}, {"prompts": {"format": "x"}},
    {"scorer": None}, {"calibration": {}}, {"golden": {"dtype": "x"}}, {"base": "x"},
    {"lora": {"rank": 0, "alpha": 8.0, "targets": ["q_proj"]}},
    {"lora": {"rank": 4, "alpha": 8.0, "targets": 5}}, {"golden": {"ids": 1, "logit": "x"}}])
def test_a_malformed_clsgen_json_is_one_sentence(run, tmp_path, change):
    """Fails if a missing or ill-typed key ends in a traceback, now or after minutes of work."""
    path = tmp_path / "run" / "clsgen.json"
    meta = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))
    with pytest.raises(ValueError, match=re.escape(str(tmp_path / "run"))):
        load_run(tmp_path / "run")


def token_before_the_last(model, hidden, prompt_end):
    """A fork's read-out: the token before the prompt's last one."""
    return model.score(states_at(hidden, prompt_end - 1).float()).squeeze(-1)


def test_a_run_of_another_read_out_is_refused(run, rows, tmp_path, monkeypatch):
    """Fails if a run that was trained with one read-out predicts with another, on either side."""
    monkeypatch.setattr(CLSGen, "read_out", token_before_the_last)
    with pytest.raises(ValueError, match="another read-out or another head"):
        load_run(tmp_path / "run")
    (tmp_path / "fork").mkdir()
    save_run(run, tmp_path / "fork", run.about)
    predicted = load_run(tmp_path / "fork").predict(rows[:2], explain=False)
    hidden = run.llama(torch.tensor([run.prompts.prompt(rows[0]["text"])[0]]))
    due = run.model.score(hidden[:, -2]).sigmoid()
    assert predicted[0]["raw_probability"] == near(due.item())
    monkeypatch.undo()
    with pytest.raises(ValueError, match="another read-out or another head"):
        load_run(tmp_path / "fork")


def test_seq_cls_is_claimed_only_where_peft_computes_the_same(run, tmp_path, monkeypatch):
    """Fails if a fork's adapter opens in peft as a classifier with another logit."""
    for read_out, task in ((CLSGen.read_out, "SEQ_CLS"), (token_before_the_last, None)):
        monkeypatch.setattr(CLSGen, "read_out", read_out)
        save_run(run, tmp_path / "run", run.about)
        config = json.loads((tmp_path / "run" / "adapter_config.json").read_text())
        assert config["task_type"] == task and bool(config["modules_to_save"]) == bool(task)


def test_a_run_of_before_has_no_read_out_on_record_and_opens(run, rows, tmp_path):
    """Fails if older run folders are refused for a key that they cannot have."""
    path = tmp_path / "run" / "clsgen.json"
    about = json.loads(path.read_text())
    del about["golden"]["read_out"]
    path.write_text(json.dumps(about))
    ours, theirs = run.predict(rows[:2]), load_run(tmp_path / "run").predict(rows[:2])
    assert [r | {"run": ""} for r in ours] == [r | {"run": ""} for r in theirs]


@pytest.mark.parametrize("row", ["the result is bad", {"text": "the result is bad", "label": 1,
                                                       "explanation": "It is bad."}])
def test_a_single_row_needs_no_list(run, row):
    """Fails if a string is taken for a list of its characters, or a dict for one of its keys."""
    assert run.predict(row) == run.predict([row]) and len(run.predict(row)) == 1
    assert run.raw_logits(row).shape == (1,)
    sums = run.reference_sums(row)
    assert sums.shape == (1, 3) and sums.any() == isinstance(row, dict)


@pytest.mark.parametrize("positives, rows", [(9, 400), (10, 20), (11, 20), (3, 400), (397, 400)])
def test_nothing_is_fitted_to_a_handful_of_a_class(positives, rows):
    """Fails if the rows are counted and not those of the rarer class, or the threshold is fitted
    all the same."""
    y = np.arange(rows) < positives
    z = np.where(y, 2.0, 0.0) + np.random.default_rng(0).normal(size=rows)
    fitted, sentence = fit("label_token", y, z, 0.4)
    if min(positives, rows - positives) < 10:
        assert fitted == Fitted("label_token", base_rate=0.4)
        assert "nothing is fitted" in sentence and "--valid" in sentence
    else:
        assert fitted.temperature != 1 and fitted.threshold != 0.5 and "calibrated" in sentence


@pytest.mark.parametrize("changes", [
    {"scorer": "x"}, {"temperature": 0.0}, {"bias": float("nan")}, {"threshold": float("inf")}])
def test_values_that_cannot_be_fitted_are_refused(changes):
    """Fails if a damaged calibration turns every p into NaN or every decision into one class."""
    with pytest.raises(ValueError, match="impossible"):
        Fitted(**changes)


def test_a_folder_that_is_no_run_says_so(run, tmp_path):
    """Fails if a stopped training is called something else, or --resume is advised too early."""
    with pytest.raises(ValueError, match="nowhere: no such folder"):
        load_run(tmp_path / "nowhere")
    (tmp_path / "run" / "clsgen.json").unlink()
    (tmp_path / "run" / "resume").mkdir()
    with pytest.raises(ValueError, match="not a run folder"):
        load_run(tmp_path / "run")
    (tmp_path / "run" / "resume" / "state.safetensors").touch()
    with pytest.raises(ValueError, match="has not finished; python train.py --resume"):
        load_run(tmp_path / "run")


def test_half_a_surrogate_pair_is_refused(run):
    """Fails if a broken command line ends in the tokenizer's TypeError."""
    with pytest.raises(ValueError, match="surrogates not allowed"):
        run.predict("a \ud800 b")


@pytest.mark.parametrize("rows, words", [
    (5, "rows is 5"), (["a", 5], "row 2 is 5"), (None, "rows is None"),
    ([{"id": 1}], "row 1 is {'id': 1}"), ({"text": 5}, "row 1 is {'text': 5}")])
def test_what_is_no_text_is_refused(run, rows, words):
    """Fails if a wrong argument ends in an error about something else."""
    with pytest.raises(ValueError, match=words):
        run.predict(rows, explain=False)


def test_losses_of_many_tokens_are_those_of_each():
    """Fails if the tokens that are taken at a time overlap, leave one out, or meet the targets or
    the base logits of others."""
    torch.manual_seed(0)
    logits = torch.randn(600, 50)
    base_logits = torch.randn(600, 50)
    targets = torch.randint(50, (600,))
    log_p = logits.log_softmax(-1)
    nll = torch.nn.functional.nll_loss(log_p, targets, reduction="none")
    kl = torch.nn.functional.kl_div(
        base_logits.log_softmax(-1), log_p, log_target=True, reduction="none").sum(-1)
    found = torch.from_numpy(nll_and_kl(logits, base_logits, targets))
    torch.testing.assert_close(found, torch.stack((nll, kl), dim=1))
    assert np.isnan(nll_and_kl(logits, None, targets)[:, 1]).all()


@pytest.mark.parametrize("size", [0, -1])
def test_a_batch_has_rows(run, size):
    """Fails if a senseless size ends in an error about something else, or in empty records."""
    with pytest.raises(ValueError, match=f"batch_size is {size}"):
        run.predict(["a"], explain=False, batch_size=size)


def test_a_saturated_probability_has_a_finite_logit(run, monkeypatch):
    """Fails if a p that is 1 in float64 makes a calibration impossible."""
    records = [{"raw_probability": p} for p in (0.0, 0.25, 1.0)]
    monkeypatch.setattr(run, "predict", lambda *args, **options: records)
    z = run.raw_logits([])
    assert z[1] == pytest.approx(np.log(1 / 3)) and np.isfinite(z).all() and z[0] == -z[2]


def test_an_overflow_is_no_decision(run):
    """Fails if a logit that is not a number becomes class 0."""
    with torch.no_grad():
        run.model.score.weight.fill_(torch.inf)
    with pytest.raises(ValueError, match="--dtype float32"):
        run.predict("some text", explain=False)


def test_an_overflow_of_the_label_words_is_no_record(run, monkeypatch):
    """Fails if only the run's own logit is looked at: a record would have a NaN, which is no
    JSON."""
    monkeypatch.setattr("clsgen.Reading.log_probability",
                        lambda reading, ids: torch.full((len(reading.h_P),), torch.nan))
    with pytest.raises(ValueError, match="--dtype float32"):
        run.predict("some text", explain=False)
