"""LoRA, the heads, the joint loss, the read-out contract, run folders, prediction, merging."""

import json
import shutil
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F
from conftest import assert_refused, make, make_run, run_script, write_model
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from test_model import VARIANTS
from transformers import AutoModelForCausalLM, AutoModelForSequenceClassification

from clsgen import (TARGETS, CLSGen, LoRALinear, Run, adapter_tensors, add_lora, choose_token,
                    joint_loss, load_run, main, merge, write_atomically)
from data import Example, Prompts, collate, encode_rows, printable
from model import load_llama

HEAD = "base_model.model.score.weight"


@pytest.fixture
def fresh(tiny):
    """A CLSGen as it is at the start of training."""
    return CLSGen(add_lora(load_llama(tiny, torch.float32), 4, 8))


def near(value):
    return pytest.approx(float(value), abs=1e-5)


# --- LoRA -----------------------------------------------------------------------------------------
@torch.no_grad()
def test_lora_changes_nothing_at_the_start(tiny, fresh):
    """Fails if B is not zero at the start."""
    ids = torch.arange(3, 30)[None]
    assert torch.equal(fresh.model(ids), load_llama(tiny, torch.float32)(ids))


@pytest.mark.parametrize("targets", [TARGETS, ("q_proj", "down_proj")])
@torch.no_grad()
def test_lora_equals_peft(tiny, targets):
    """Fails if alpha is not divided by the rank, A and B swap places, or a target is missed."""
    base = AutoModelForCausalLM.from_pretrained(tiny, dtype=torch.float32)
    config = LoraConfig(r=4, lora_alpha=12, target_modules=list(targets))
    theirs = get_peft_model(base, config).eval()
    ours = add_lora(load_llama(tiny, torch.float32), 4, 12, targets)
    names = {name: p for name, p in ours.named_parameters() if "lora_" in name}
    for name, parameter in theirs.named_parameters():
        if "lora_" in name:
            parameter.normal_(std=0.1)
            short = name.removeprefix("base_model.model.model.").replace(".default", "")
            names.pop(short).copy_(parameter)
    assert not names
    ids = torch.arange(3, 40)[None]
    torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("ids, first", [
    (([7, 4], [9, 4]), (7, 9)), (([5, 7, 4], [5, 9, 4]), (7, 9)), (([5, 4], [5, 4, 6, 4]), None)])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_the_head_starts_as_the_models_own_log_odds(tmp_path, tied, ids, first):
    """Fails if the sign is turned, another token is taken, or the input rows of an untied model."""
    write_model(tmp_path, tie_word_embeddings=tied)
    model = CLSGen(load_llama(tmp_path, torch.float32))
    model.start_head(ids)
    z, logits = model(collate([Example(0, [3, 4, 5], [6], 1, 0)], "cpu"))
    odds = logits[0, first[1]] - logits[0, first[0]] if first else 0.0
    assert z.item() == near(odds)


def test_what_trains_is_a_partition(fresh):
    """Fails if the head is frozen, the base trains, or a parameter is in no group or in two."""
    groups = fresh.parameter_groups()
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in fresh.named_parameters())
    assert list(groups["head"]) == ["score.weight"]
    assert len(groups["lora"]) == 2 * 7 * 2 and all(".lora_" in name for name in groups["lora"])
    for kind, group in groups.items():
        assert {p.requires_grad for p in group.values()} == {kind != "frozen"}
        assert kind == "frozen" or {p.dtype for p in group.values()} == {torch.float32}


def test_a_step_moves_lora_and_head_and_leaves_the_base(tiny, rows, fresh):
    """Fails if the score head gets no gradient, its start is zero (then A gets none from BCE), or a
    base weight moves."""
    groups = fresh.parameter_groups()
    trained = groups["lora"] | groups["head"]
    before = {name: p.detach().clone() for name, p in fresh.named_parameters()}
    optimizer = torch.optim.Adam(trained.values(), lr=0.01)  # AdamW decays what has no gradient
    batch = collate(encode_rows(rows[:4], Prompts(tiny), answers=False))  # the score head only
    for _ in range(2):
        optimizer.zero_grad()
        z, logits = fresh(batch)
        joint_loss(z, batch.labels, logits, batch.targets, 4, 0, 1.0, 1.0)[0].backward()
        optimizer.step()
    moved = {name for name, p in fresh.named_parameters() if not torch.equal(p, before[name])}
    assert moved == trained.keys()


# --- the joint loss -------------------------------------------------------------------------------
def gradient(model, examples, size):
    """Gradient of one optimizer step over `examples` in micro-batches of `size`."""
    model.zero_grad()
    counts = len(examples), sum(len(example.answer) for example in examples)
    for start in range(0, len(examples), size):
        batch = collate(examples[start : start + size])
        z, logits = model(batch)
        joint_loss(z, batch.labels, logits, batch.targets, *counts, 1.0, 0.7)[0].backward()
    return torch.cat([p.grad.flatten() for p in model.parameters() if p.requires_grad])


@pytest.mark.parametrize("size", [1, 4, 5])
def test_micro_batches_give_the_gradient_of_one_batch(tiny, rows, size):
    """Fails if a loss is a mean of micro-batch means: rows without answer and answers of different
    lengths make that another gradient."""
    model, examples = make(tiny), encode_rows(rows[:16], Prompts(tiny))
    whole, parts = gradient(model, examples, 16), gradient(model, examples, size)
    torch.testing.assert_close(parts, whole, atol=1e-6, rtol=1e-4)


def test_joint_loss_is_the_two_means_and_zero_without_answers():
    """Fails if the answers' mean is taken over examples, a weight goes to the other loss, or the LM
    loss of a window without answers is 0 / 0 or has its graph cut off."""
    z, y = torch.randn(3, requires_grad=True), torch.tensor([1.0, 0.0, 1.0])
    logits, targets = torch.randn(7, 11), torch.randint(0, 11, (7,))
    loss, bce, lm = joint_loss(z, y, logits, targets, 3, 7, 2.0, 0.5)
    torch.testing.assert_close(bce, F.binary_cross_entropy_with_logits(z, y))
    torch.testing.assert_close(lm, F.cross_entropy(logits, targets))
    torch.testing.assert_close(loss, 2 * bce + 0.5 * lm)
    loss, _, lm = joint_loss(z, y, logits[:0], targets[:0], 3, 0, 0.0, 1.0)
    loss.backward()
    assert lm == 0 and loss == 0 and torch.equal(z.grad, torch.zeros(3))


# --- the read-out contract (the score sees the prompt only) ---------------------------------------
@torch.no_grad()
def test_the_logit_does_not_see_the_answer(tiny, rows):
    """Fails if the head reads the row's last token, or any token after the prompt."""
    model, examples = make(tiny), encode_rows(rows[1:4], Prompts(tiny))
    z, _ = model(collate(examples))
    others = [Example(e.id, e.prompt, [7 + i] * len(e.answer), 1 - e.label, 0)
              for i, e in enumerate(examples)]
    assert torch.equal(model(collate(others))[0], z)  # other tokens, other label: the same bits
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


@torch.no_grad()
def test_prediction_and_training_read_the_same_logit(rows, run):
    """Fails if prediction reads another position than training, or skips temperature or bias."""
    z, _ = run.model(collate(encode_rows(rows[:6], run.prompts, answers=False)))
    records = run.predict(rows[:6], explain=False, batch_size=4)
    for record, row, logit in zip(records, rows[:6], z, strict=True):
        assert record["id"] == row["id"] and record["true_label"] == row["label"]
        assert record["raw_probability"] == near(logit.sigmoid())
        assert record["probability"] == near((logit / 2 + 0.5).sigmoid())
        assert record["label"] == (record["probability"] >= 0.6)
        assert record["explanation"] is None and record["agree"] is None


# --- text from the same cache ---------------------------------------------------------------------
@torch.no_grad()
def label_token_probability(run, text):
    """p("Yes.") against p("No.") after the prompt, each in a pass of its own."""
    prompt, scores = run.prompts.prompt(text)[0], []
    for answer in run.prompts.label_ids:
        logp = run.llama.logits(run.llama(torch.tensor([prompt + answer])))[0].log_softmax(-1)
        scores.append(sum(logp[len(prompt) - 1 + i, token] for i, token in enumerate(answer)))
    return (scores[1] - scores[0]).sigmoid()


def test_label_token_score_is_the_whole_strings_probability(rows, run):
    """Fails if only the first token counts, one word is scored from the other's cache, or a label
    string that is a single token has no score."""
    assert len(run.prompts.label_ids[1]) > 1
    for label_ids in (run.prompts.label_ids, [[7], [8]]):
        run.prompts.label_ids = label_ids
        for record, row in zip(run.predict(rows[:5], batch_size=3), rows[:5], strict=True):
            due = label_token_probability(run, row["text"])
            assert record["label_token_probability"] == near(due)


def test_an_lm_only_run_takes_the_label_token_as_its_score(tiny, rows, tmp_path):
    """Fails if the untrained head of an LM-only run gives the probability."""
    run = make_run(tiny, tmp_path / "lm", scorer="label_token")
    for record in run.predict(rows[:3]):
        assert record["raw_probability"] == pytest.approx(record["label_token_probability"])


@torch.no_grad()
def greedy_without_cache(run, text):
    """The answer's token ids."""
    prompt, answer = run.prompts.prompt(text)[0], []
    while len(answer) < run.prompts.max_answer and not set(answer) & set(run.prompts.stop_ids):
        hidden = run.llama(torch.tensor([prompt + answer]))
        answer.append(int(run.llama.logits(hidden[0, -1]).argmax()))
    return answer


def test_greedy_text_does_not_depend_on_batch_or_cache(rows, run):
    """Fails if decoding writes a row's token at the batch's position, or goes on after a stop."""
    for batch_size in (1, 5):
        answers = [greedy_without_cache(run, row["text"]) for row in rows[:5]]
        due = [run.prompts.parse(run.prompts.decode(answer)) for answer in answers]
        records = run.predict(rows[:5], batch_size=batch_size)
        assert [(r["stated_label"], r["explanation"]) for r in records] == due
        run.prompts.stop_ids = [answers[0][2]]  # from now on, rows stop at different lengths
    assert len(set(map(len, answers))) > 1


@pytest.mark.parametrize("threshold", [0.0, 1.0])
def test_decide_head_makes_the_text_state_the_decision(rows, run, threshold):
    """Fails if the answer is not started with the word of the head's decision."""
    run.meta["threshold"] = threshold
    for record in run.predict(rows[:4], decide="head"):
        assert record["agree"] and record["stated_label"] == record["label"] == (threshold == 0)


@pytest.mark.parametrize("temperature, top_p, weights", [
    (1.0, 0.6, [0.5, 0.3, 0, 0]), (0.5, 1.0, [0.25, 0.09, 0.0225, 0.0025])])
def test_sampling_keeps_to_the_nucleus(temperature, top_p, weights):
    """Fails if top-p keeps tokens beyond the mass, drops the one that crosses it, or if the
    temperature is not a divisor."""
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    drawn = choose_token(logits, temperature, top_p, torch.Generator().manual_seed(0))
    due = torch.tensor(weights) / sum(weights)
    torch.testing.assert_close(drawn.bincount(minlength=4) / 4000, due, atol=0.03, rtol=0)


# --- run folders ----------------------------------------------------------------------------------
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
    ("random head", "fixed sentence"), ("no head", f"missing {HEAD}"),
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
        base = shutil.copytree(run.meta["base"], tmp_path / "other")
        config = json.loads((base / "config.json").read_text())
        for file in base.glob("*.safetensors") if how == "base weights" else ():
            save_file({name: 0.9 * tensor for name, tensor in load_file(file).items()}, file)
        if how == "base config":
            (base / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-6}))
    with pytest.raises(ValueError, match=words):
        load_run(tmp_path / "run", model=base)


@torch.no_grad()
def test_a_merged_folder_is_the_same_model(rows, run, tmp_path):
    """Fails if merging misses a projection, scales by alpha alone, or loses the head."""
    due = run.predict(rows[:4])
    merge(run, Path(run.meta["base"]), tmp_path / "merged")
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


def test_writing_is_all_or_nothing(tmp_path, monkeypatch):
    """Fails if a failed write leaves half a file under the name, or litter beside it."""
    def fail(*_):
        raise OSError("disk full")

    path = tmp_path / "x.json"
    write_atomically(path, "old")
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
    assert f"probability of Yes: {run.predict([text])[0]['probability']:.3f}" in out
    answer = run.prompts.decode(greedy_without_cache(run, text))
    assert printable(answer).rstrip("\ufffd") in out


def test_a_file_of_predictions(rows_file, rows, run, tmp_path):
    """Fails if rows come out in another order, twice or not at all, or a file is overwritten."""
    out = tmp_path / "p.jsonl"
    command = f"--run {tmp_path / 'run'} --data {rows_file} --out {out} --no-explain".split()
    main([*command, "--batch", "3"])
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["id"] for line in lines] == [row["id"] for row in rows]
    with pytest.raises(ValueError, match="exists"):
        main(command)
    main([*command, "--overwrite"])


def test_a_stopped_prediction_goes_on_from_any_byte(rows, run, tmp_path, monkeypatch):
    """Fails if a row is lost, doubled or computed again, or draws depend on where it stopped."""
    data, out = tmp_path / "rows.jsonl", tmp_path / "p.jsonl"
    data.write_text("".join(json.dumps(row | {"id": f"{row['id']}\u2028"}) + "\n" for row in rows))
    command = f"--run {tmp_path / 'run'} --data {data} --out {out} --batch 1".split()
    command += ["--temperature", "1"]
    main(command)
    due, part, predict, calls = out.read_bytes(), tmp_path / "p.jsonl.part", Run.predict, []
    out.unlink()

    def stop_at_the_third(*arguments):
        calls.append(arguments)
        if len(calls) == 3:
            raise KeyboardInterrupt
        return predict(*arguments)

    monkeypatch.setattr("clsgen.Run.predict", stop_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        main(command)
    begun = part.read_bytes()
    assert begun.count(b"\n") == 1 + 16 and not out.exists()
    with pytest.raises(ValueError, match="other arguments or data"):
        main([*command, "--seed", "9"])
    for size in (begun.index(b"\n") + 1, len(begun) // 2, len(begun) - 1, len(begun)):
        part.write_bytes(begun[:size])
        calls[:] = [None] * 3
        main(command)
        assert out.read_bytes() == due and not part.exists()
        assert len(calls) - 3 == 5 - (begun[:size].count(b"\n") - 1) // 8, "chunks of 8 still to do"
        out.unlink()


@pytest.mark.parametrize("targets", [TARGETS, ("v_proj", "up_proj", "down_proj")])
@pytest.mark.parametrize("variant", ["tied", "qwen2", "qwen3"])
@torch.no_grad()
def test_packed_lora_is_lora(tmp_path, variant, targets, monkeypatch):
    """Fails if a projection gets another one's LoRA or bias, if a group of which not all have LoRA
    slips, or if the base model cannot be had from a packed run."""
    write_model(tmp_path, **VARIANTS[variant])
    ids, found = torch.arange(2, 62).view(3, 20), []
    for pack in (False, True):
        torch.manual_seed(0)
        llama = add_lora(load_llama(tmp_path, torch.bfloat16), 4, 8.0, targets)
        for name, parameter in llama.named_parameters():
            if "lora_B" in name:
                parameter.normal_(std=0.3)
        llama = llama.pack() if pack else llama
        found.append([llama(ids)])
        with monkeypatch.context() as patch:
            patch.setattr(LoRALinear, "off", True)
            found[-1].append(llama(ids))
    if not llama.packed_head:
        pytest.skip("nothing is packed on this processor")
    left = [name for name, _ in llama.named_parameters() if "proj" in name]
    assert all(name.endswith("bias") for name in left)
    base = load_llama(tmp_path, torch.bfloat16)(ids)
    for (lora, off), name in zip(found, ("plain", "packed"), strict=True):
        torch.testing.assert_close(lora, found[0][0], atol=0.02, rtol=0.02, msg=name)
        torch.testing.assert_close(off, base, atol=0.02, rtol=0.02, msg=name)
    assert (found[0][0] - base).abs().mean() > 0.2


def test_a_packed_run_is_not_saved(tiny):
    """Fails if a run without its LoRA weights, packed for predictions, is written as if whole."""
    model = CLSGen(add_lora(load_llama(tiny, torch.bfloat16), 4, 8.0))
    assert len(adapter_tensors(model)) == 29
    if model.model.pack().packed_head:  # not on every processor
        with pytest.raises(ValueError, match="pack=False"):
            adapter_tensors(model)


@pytest.mark.parametrize("change", [
    {"golden": None}, {"threshold": "x"}, {"lora": {}}, {"prompts": {"format": "x"}},
    {"scorer": None}, {"calibration": {}}, {"golden": {"dtype": "x"}}, {"base": "x"},
    {"lora": {"rank": 0, "alpha": 8.0, "targets": ["q_proj"]}}])
def test_a_malformed_clsgen_json_is_one_sentence(run, tmp_path, change):
    """Fails if a missing or ill-typed key ends in a traceback, now or after minutes of work."""
    path = tmp_path / "run" / "clsgen.json"
    meta = {**json.loads(path.read_text()), **change}
    path.write_text(json.dumps({key: value for key, value in meta.items() if value is not None}))
    with pytest.raises(ValueError, match="clsgen.json|not there|LoRA rank 0"):
        load_run(tmp_path / "run")


@pytest.mark.parametrize("arguments, words", [
    ("", "--text or --data"), ("--data x", "--out is missing"), ("merge", "--out is missing"),
    ("--text a --top-p 0 --batch 0", "--batch 0"), ("--text a", "nowhere")])
def test_a_wrong_call_is_one_sentence_and_exit_code_2(arguments, words):
    """Fails if a user's mistake ends in a traceback, or in exit code 0 or 1."""
    done = run_script("clsgen.py", *arguments.split(), "--run", "nowhere")
    assert_refused(done, "error: ", words)
