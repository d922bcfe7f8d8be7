"""LoRA, the heads, the joint loss, the read-out contract, run folders, prediction, merging."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import ROOT, write_model, write_tokenizer
from safetensors.torch import load_file, save_file

from clsgen import (
    TARGETS,
    CLSGen,
    Run,
    add_lora,
    base_fingerprint,
    choose_token,
    joint_loss,
    load_run,
    main,
    merge,
    write_atomically,
)
from data import Example, Prompts, collate, encode_rows, printable
from model import load_llama


def make(folder, seed=0, b=0.2, dtype=torch.float32):
    """A CLSGen whose LoRA and head are random, as after training."""
    torch.manual_seed(seed)
    model = CLSGen(add_lora(load_llama(folder, dtype), 4, 8.0)).eval()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=b)
    return model


def make_run(folder, out, scorer="head", **settings):
    model, prompts = make(folder), Prompts(folder, max_answer=12, **settings)
    meta = {
        "base": str(folder),
        "base_fingerprint": base_fingerprint(folder),
        "scorer": scorer,
        "prompts": prompts.settings(),
        "lora": {"rank": 4, "alpha": 8.0, "targets": list(TARGETS)},
        "calibration": {"temperature": 2.0, "bias": 0.5},
        "threshold": 0.6,
        "base_rate": 0.4,
    }
    out.mkdir()
    run = Run(model, prompts, meta)
    run.save(out)
    return run


@pytest.fixture
def run(tiny, tmp_path):
    return make_run(tiny, tmp_path / "run")


# --- LoRA -----------------------------------------------------------------------------------------


@torch.no_grad()
def test_lora_changes_nothing_at_the_start(tiny):
    """Fails if B is not zero at the start."""
    ids = torch.arange(3, 30)[None]
    plain = load_llama(tiny, torch.float32)
    assert torch.equal(add_lora(load_llama(tiny, torch.float32), 4, 8)(ids), plain(ids))


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "down_proj")])
def test_lora_equals_peft(tiny, targets):
    """Fails if alpha is not divided by the rank, A and B swap places, or a target is missed."""
    from peft import LoraConfig, get_peft_model
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    theirs = get_peft_model(
        base, LoraConfig(r=4, lora_alpha=12, target_modules=list(targets))
    ).eval()
    ours = add_lora(load_llama(tiny, torch.float32), 4, 12, targets)
    with torch.no_grad():
        names = dict(ours.named_parameters())
        for name, parameter in theirs.named_parameters():
            if "lora_" in name:
                parameter.normal_(std=0.1)
                short = name.removeprefix("base_model.model.model.").replace(".default", "")
                names.pop(short).copy_(parameter)
        assert not [name for name in names if "lora_" in name]
        ids = torch.arange(3, 40).view(1, -1)
        torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-5, rtol=1e-5)


def test_what_trains_is_a_partition(tiny):
    """Fails if the head is frozen, the base trains, or a parameter is in no group or in two."""
    model = CLSGen(add_lora(load_llama(tiny, torch.float32), 4, 8))
    groups = model.parameter_groups()
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in model.named_parameters())
    assert list(groups["head"]) == ["score.weight"]
    assert len(groups["lora"]) == 2 * 7 * 2 and all(".lora_" in name for name in groups["lora"])
    for kind, group in groups.items():
        assert {p.requires_grad for p in group.values()} == {kind != "frozen"}
        assert kind == "frozen" or {p.dtype for p in group.values()} == {torch.float32}


def test_a_step_moves_lora_and_head_and_leaves_the_base(tiny, rows):
    """Fails if the score head gets no gradient, its start is zero (then A gets none from BCE), or a
    base weight moves."""
    model = CLSGen(add_lora(load_llama(tiny, torch.float32), 4, 8))
    groups = model.parameter_groups()
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    optimizer = torch.optim.AdamW(
        [p for k in ("lora", "head") for p in groups[k].values()], lr=0.01
    )
    batch = collate(encode_rows(rows[:4], Prompts(tiny), answers=False))  # the score head only
    for _ in range(2):
        optimizer.zero_grad()
        z, logits = model(batch)
        joint_loss(z, batch.labels, logits, batch.targets, 4, 0, 1.0, 1.0)[0].backward()
        optimizer.step()
    moved = {name for name, p in model.named_parameters() if not torch.equal(p, before[name])}
    assert moved == groups["lora"].keys() | groups["head"].keys()


# --- the joint loss -------------------------------------------------------------------------------


def gradient(model, examples, size, denominators=None):
    """Gradient of one optimizer step over `examples` in micro-batches of `size`."""
    model.zero_grad()
    for start in range(0, len(examples), size):
        batch = collate(examples[start : start + size])
        z, logits = model(batch)
        counts = denominators or (len(examples), sum(len(e.answer) for e in examples))
        joint_loss(z, batch.labels, logits, batch.targets, *counts, 1.0, 0.7)[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("size", [1, 4, 5])
def test_micro_batches_give_the_gradient_of_one_batch(tiny, rows, size):
    """Fails if a loss is a mean of micro-batch means: rows without answer and answers of different
    lengths make that another gradient."""
    model, examples = make(tiny), encode_rows(rows[:16], Prompts(tiny))
    whole, parts = gradient(model, examples, 16), gradient(model, examples, size)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)


def test_joint_loss_is_the_two_means(tiny):
    """Fails if the answers' mean is taken over examples, or a weight goes to the other loss."""
    z, y = torch.randn(3), torch.tensor([1.0, 0.0, 1.0])
    logits, targets = torch.randn(7, 11), torch.randint(0, 11, (7,))
    loss, bce, lm = joint_loss(z, y, logits, targets, 3, 7, 2.0, 0.5)
    torch.testing.assert_close(bce, F.binary_cross_entropy_with_logits(z, y))
    torch.testing.assert_close(lm, F.cross_entropy(logits, targets))
    torch.testing.assert_close(loss, 2 * bce + 0.5 * lm)


def test_no_answers_is_zero_and_not_nan(tiny):
    """Fails if the LM loss of a window without answers is 0 / 0, or its graph is cut off."""
    z = torch.randn(2, requires_grad=True)
    loss, _, lm = joint_loss(
        z, torch.ones(2), torch.zeros(0, 9), torch.zeros(0).long(), 2, 0, 0.0, 1.0
    )
    loss.backward()
    assert lm == 0 and loss == 0 and torch.equal(z.grad, torch.zeros(2))


# --- the read-out contract (the score sees the prompt only) ---------------------------------------


@torch.no_grad()
def test_the_logit_does_not_see_the_answer(tiny, rows):
    """Fails if the head reads the row's last token, or any token after the prompt."""
    model, prompts = make(tiny), Prompts(tiny)
    examples = encode_rows(rows[1:4], prompts)
    z, _ = model(collate(examples))
    others = [
        Example(e.id, e.prompt, [7 + i] * len(e.answer), 1 - e.label, 0)
        for i, e in enumerate(examples)
    ]
    assert torch.equal(
        model(collate(others))[0], z
    )  # other tokens, other label, same length: same bits
    bare = [Example(e.id, e.prompt, [], e.label, 0) for e in examples]
    torch.testing.assert_close(model(collate(bare))[0], z, atol=1e-5, rtol=0)
    for i, example in enumerate(examples):  # other batch mates, other padding
        torch.testing.assert_close(model(collate([example]))[0], z[i : i + 1], atol=1e-5, rtol=0)


@torch.no_grad()
def test_pad_equal_to_eos_or_in_the_text_changes_nothing(tiny):
    """Fails if positions are found by looking for a pad id: here prompts hold 0 and 2 too."""
    model = make(tiny)
    a, b = Example(1, [5, 0, 2, 0], [2], 1, 0), Example(2, [0, 0, 2, 5, 9, 2, 0, 0], [], 0, 0)
    z, _ = model(collate([a, b]))
    torch.testing.assert_close(z[:1], model(collate([a]))[0], atol=1e-5, rtol=0)
    assert (model(collate([Example(1, [5, 0, 2, 5], [2], 1, 0)]))[0] - z[0]).abs() > 1e-4


def test_prediction_and_training_read_the_same_logit(tiny, rows, run):
    """Fails if prediction reads another position than training, or skips temperature or bias."""
    examples = encode_rows(rows[:6], run.prompts, answers=False)
    with torch.no_grad():
        z, _ = run.model(collate(examples))
    records = run.predict(rows[:6], explain=False, batch_size=4)
    for record, row, logit in zip(records, rows, z, strict=False):
        assert record["id"] == row["id"] and record["true_label"] == row["label"]
        assert record["raw_probability"] == pytest.approx(logit.sigmoid().item(), abs=1e-5)
        assert record["probability"] == pytest.approx((logit / 2 + 0.5).sigmoid().item(), abs=1e-5)
        assert record["label"] == (record["probability"] >= 0.6)
        assert record["explanation"] is None and record["agree"] is None


# --- text from the same cache ---------------------------------------------------------------------


@torch.no_grad()
def log_probability(run, prompt, answer):
    logits = run.llama.logits(run.llama(torch.tensor([prompt + answer])))[0].log_softmax(-1)
    return sum(logits[len(prompt) - 1 + i, token] for i, token in enumerate(answer))


def test_label_token_score_is_the_whole_strings_probability(tiny, rows, run):
    """Fails if only the first token counts, or one word is scored from the other's cache."""
    for record, row in zip(run.predict(rows[:5], batch_size=3), rows, strict=False):
        prompt, _ = run.prompts.prompt(row["text"])
        no, yes = (log_probability(run, prompt, ids) for ids in run.prompts.label_ids)
        assert len(run.prompts.label_ids[1]) > 1
        assert record["label_token_probability"] == pytest.approx(
            (yes - no).sigmoid().item(), abs=1e-5
        )


def test_an_lm_only_run_takes_the_label_token_as_its_score(tiny, rows, tmp_path):
    """Fails if the untrained head of an LM-only run gives the probability."""
    run = make_run(tiny, tmp_path / "lm", scorer="label_token")
    for record in run.predict(rows[:3]):
        assert record["raw_probability"] == pytest.approx(record["label_token_probability"])


def greedy_without_cache(run, text):
    prompt, _ = run.prompts.prompt(text)
    ids = list(prompt)
    with torch.no_grad():
        while len(ids) - len(prompt) < run.prompts.max_answer:
            ids.append(int(run.llama.logits(run.llama(torch.tensor([ids]))[0, -1]).argmax()))
            if ids[-1] in run.prompts.stop_ids:
                break
    return run.prompts.decode(ids[len(prompt) :])


def test_greedy_text_does_not_depend_on_batch_or_cache(tiny, rows, run):
    """Fails if decoding writes a row's token at the batch's position, or goes on after a stop."""
    for batch_size in (1, 5):
        for record, row in zip(run.predict(rows[:5], batch_size=batch_size), rows, strict=False):
            answer = greedy_without_cache(run, row["text"])
            assert (record["stated_label"], record["explanation"]) == run.prompts.parse(answer)


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_decide_head_makes_the_text_state_the_decision(rows, run, threshold):
    """Fails if the answer is not started with the word of the head's decision."""
    run.meta["threshold"] = threshold
    for record in run.predict(rows[:4], decide="head"):
        assert record["agree"] and record["stated_label"] == record["label"] == (threshold == 0)


def test_sampling_keeps_to_the_nucleus():
    """Fails if top-p keeps tokens beyond the mass, drops the one that crosses it, or if the
    temperature is not a divisor."""
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    seed = torch.Generator().manual_seed(0)
    counts = choose_token(logits, 1.0, 0.6, seed).bincount(minlength=4) / 4000
    torch.testing.assert_close(counts, torch.tensor([0.625, 0.375, 0, 0]), atol=0.03, rtol=0)
    counts = choose_token(logits, 0.5, 1.0, seed).bincount(minlength=4) / 4000
    due = torch.tensor([0.25, 0.09, 0.0225, 0.0025])
    torch.testing.assert_close(counts, due / due.sum(), atol=0.03, rtol=0)


# --- run folders ----------------------------------------------------------------------------------


def test_a_run_opens_with_the_same_predictions(rows, run, tmp_path):
    """Fails if a file of the run folder leaves out calibration, threshold, settings or the head."""
    again = load_run(tmp_path / "run")
    ours, theirs = run.predict(rows[:4]), again.predict(rows[:4])
    assert [r | {"run": ""} for r in ours] == [r | {"run": ""} for r in theirs]
    assert len(theirs[0]["run"]) == 12


def test_the_adapter_holds_exactly_lora_and_head(tmp_path, run):
    """Fails if a base weight is saved, the head is not, or a name is not peft's."""
    names = load_file(tmp_path / "run" / "adapter_model.safetensors").keys()
    due = {"base_model.model.score.weight"}
    for layer in range(2):
        for target in TARGETS:
            part = "mlp" if target in TARGETS[4:] else "self_attn"
            for ab in "AB":
                due.add(f"base_model.model.model.layers.{layer}.{part}.{target}.lora_{ab}.weight")
    assert names == due


def test_peft_opens_a_run_with_the_same_logit_and_the_same_text(tiny, rows, run, tmp_path):
    """Fails if adapter_config.json is not peft's layout, or the head goes by another name there."""
    from peft import PeftModel
    from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

    base = AutoModelForSequenceClassification.from_pretrained(
        tiny, num_labels=1, dtype=torch.float32
    )
    classifier = PeftModel.from_pretrained(base, tmp_path / "run").eval()
    lm = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    lm = PeftModel.from_pretrained(lm, tmp_path / "run").eval()
    for row, record in zip(rows[:3], run.predict(rows[:3]), strict=True):
        ids = torch.tensor([run.prompts.prompt(row["text"])[0]])
        with torch.no_grad():
            z = classifier(input_ids=ids).logits[0, 0]
            text = lm.generate(input_ids=ids, max_new_tokens=12, do_sample=False)[0, ids.shape[1] :]
        assert z.sigmoid().item() == pytest.approx(record["raw_probability"], abs=1e-5)
        answer = run.prompts.decode(text.tolist())
        assert run.prompts.parse(answer) == (record["stated_label"], record["explanation"])


def break_run(how, base, folder, tmp_path):
    path = folder / "adapter_model.safetensors"
    if how == "head":
        tensors = load_file(path)
        tensors["base_model.model.score.weight"] = torch.randn(1, 32)
        save_file(tensors, path)
    elif how == "missing":
        tensors = load_file(path)
        del tensors["base_model.model.score.weight"]
        save_file(tensors, path)
    elif how == "truncated":
        path.write_bytes(path.read_bytes()[:-9])
    elif how == "base weights":  # same names and shapes, so the fingerprint cannot tell
        write_model(tmp_path / "other", seed=1)
        write_tokenizer(tmp_path / "other")
        return tmp_path / "other"
    elif how == "base config":
        write_model(tmp_path / "other", rms_norm_eps=1e-6)
        write_tokenizer(tmp_path / "other")
        return tmp_path / "other"
    return base


@pytest.mark.parametrize(
    "how, words",
    [
        ("head", "fixed sentence"),
        ("base weights", "fixed sentence"),
        ("base config", "not the base of"),
        ("missing", "missing base_model.model.score.weight"),
        ("truncated", "adapter_model.safetensors"),
    ],
)
def test_a_run_that_does_not_fit_is_refused(tiny, run, tmp_path, how, words):
    """Fails if a wrong base, a random head or a cut file gives predictions all the same."""
    base = break_run(how, tiny, tmp_path / "run", tmp_path)
    with pytest.raises(ValueError, match=words):
        load_run(tmp_path / "run", model=base)


def test_a_merged_folder_is_the_same_model(rows, run, tmp_path):
    """Fails if merging misses a projection, scales by alpha alone, or loses the head."""
    from transformers import AutoModelForCausalLM

    due = run.predict(rows[:4])
    merge(run, Path(run.meta["base"]), tmp_path / "merged")
    again = load_run(tmp_path / "merged")
    for ours, theirs in zip(due, again.predict(rows[:4]), strict=True):
        assert theirs["raw_probability"] == pytest.approx(ours["raw_probability"], abs=1e-5)
        assert theirs["explanation"] == ours["explanation"]
    theirs, info = AutoModelForCausalLM.from_pretrained(
        tmp_path / "merged", output_loading_info=True, dtype=torch.float32
    )
    assert not any(info.values())
    ids = torch.arange(3, 30)[None]
    with torch.no_grad():
        logits = again.llama.logits(again.llama(ids))
        torch.testing.assert_close(theirs(ids).logits, logits, atol=1e-4, rtol=1e-4)


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    """Fails if a failed write leaves half a file under the name, or litter beside it."""
    path = tmp_path / "x.json"
    write_atomically(path, "old")

    def fail(*_):
        raise OSError("disk full")

    monkeypatch.setattr("os.fsync", fail)
    with pytest.raises(OSError):
        write_atomically(path, "new")
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]


# --- the command ----------------------------------------------------------------------------------


def test_one_text_on_the_command_line(run, tmp_path, capsys):
    """Fails if the printed probability is not predict's, or the streamed text differs from it."""
    text = "case 3: the result is bad"
    main(["--run", str(tmp_path / "run"), "--text", text])
    out = capsys.readouterr().out
    record = run.predict([text])[0]
    assert f"probability of Yes: {record['probability']:.3f}" in out
    assert printable(greedy_without_cache(run, text)).rstrip("\ufffd") in out


def test_a_file_of_predictions(rows_file, rows, run, tmp_path):
    """Fails if rows come out in another order, twice or not at all, or a file is overwritten."""
    out = tmp_path / "p.jsonl"
    arguments = [
        "--run",
        str(tmp_path / "run"),
        "--data",
        str(rows_file),
        "--out",
        str(out),
        "--no-explain",
    ]
    main([*arguments, "--batch", "3"])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    with pytest.raises(ValueError, match="exists"):
        main(arguments)
    main([*arguments, "--overwrite"])


MALFORMED = [{"golden": None}, {"threshold": "x"}, {"lora": {}}, {"prompts": {"format": "x"}}]
MALFORMED += [{"scorer": None}, {"calibration": {}}, {"golden": {"dtype": "x"}}, {"base": "x"}]


@pytest.mark.parametrize("change", MALFORMED)
def test_a_malformed_clsgen_json_is_one_sentence(run, tmp_path, change):
    """Fails if a missing or ill-typed key ends in a traceback, now or after minutes of work."""
    path = tmp_path / "run" / "clsgen.json"
    meta = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))
    with pytest.raises(ValueError, match="clsgen.json|not there"):
        load_run(tmp_path / "run")


def test_label_words_of_one_token_are_scored(tiny, rows, tmp_path):
    """Fails if a label string that is a single token has no score."""
    run = make_run(tiny, tmp_path / "one")
    run.prompts.label_ids = [[7], [8]]
    prompt, _ = run.prompts.prompt(rows[0]["text"])
    no, yes = (log_probability(run, prompt, ids) for ids in ([7], [8]))
    record = run.predict(rows[:1])[0]
    assert record["label_token_probability"] == pytest.approx((yes - no).sigmoid().item(), abs=1e-5)


@pytest.mark.parametrize(
    "arguments, words",
    [
        ([], "--text or --data"),
        (["--data", "x"], "--out is missing"),
        (["merge"], "--out is missing"),
        (["--text", "a", "--top-p", "0", "--batch", "0"], "--batch 0"),
        (["--text", "a"], "nowhere"),
    ],
)
def test_a_wrong_call_is_one_sentence_and_exit_code_2(arguments, words):
    """Fails if a user's mistake ends in a traceback, or in exit code 0 or 1."""
    command = [sys.executable, str(ROOT / "clsgen.py"), *arguments, "--run", "nowhere"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2 and done.stderr.startswith("error: ") and words in done.stderr
    assert done.stderr.count("\n") == 1
