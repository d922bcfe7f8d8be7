"""LoRA, the heads, the joint loss, the read-out contract, and text from the cache."""

import pytest
import torch
import torch.nn.functional as F
from conftest import greedy_without_cache, make, make_run, near, write_model
from peft import LoraConfig, get_peft_model
from transformers import AutoModelForCausalLM

from clsgen import (
    TARGETS, CLSGen, add_lora, choose_token, first_difference, joint_loss, label_loss, total_loss)
from data import Example, collate, encode_rows
from plumbing.adapter import PREFIX, adapter_tensors, lora_alone
from plumbing.checkpoint import load_llama
from prompts import Prompts



@pytest.fixture
def fresh(tiny):
    """A CLSGen as it is at the start of training."""
    return CLSGen(add_lora(load_llama(tiny, torch.float32), 4, 8))


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
    torch.testing.assert_close(ours.logits(ours(ids)), theirs(ids).logits, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("ids, first", [
    (([7, 4], [9, 4]), (7, 9)), (([5, 7, 4], [5, 9, 4]), (7, 9))])
@pytest.mark.parametrize("tied", [True, False])
@torch.no_grad()
def test_the_head_starts_as_the_models_own_log_odds(tmp_path, tied, ids, first):
    """Fails if the sign is turned, another token is taken, or the input rows of an untied model."""
    write_model(tmp_path, tie_word_embeddings=tied)
    model = CLSGen(load_llama(tmp_path, torch.float32))
    model.start_head(ids)
    z, logits = model(collate([Example(0, [3, 4, 5], [6], 1, 0)], "cpu"))
    assert z.item() == near(logits[0, first[1]] - logits[0, first[0]])


def test_label_words_that_never_differ_are_refused():
    """Fails if two words without a differing token silently give a head or a loss of nothing."""
    with pytest.raises(ValueError, match="--labels"):
        first_difference(([5, 4], [5, 4, 6, 4]))


@pytest.mark.parametrize("over", ["vocabulary", "words"])
def test_label_loss_is_the_mean_cross_entropy_of_the_label_token(tiny, over):
    """Fails if another position is read, the words change places, or it is a mean over tokens."""
    examples = [Example(0, [3, 4, 5], [5, 9, 6, 2], 1, 0), Example(1, [3, 4], [5, 7, 2], 0, 0),
                Example(2, [3, 4, 8], [], 1, 0)]
    batch = collate(examples)
    logits = torch.randn(7, 11)
    found = label_loss(logits, batch, ([5, 7], [5, 9]), over, 2)
    columns = [7, 9] if over == "words" else list(range(11))
    expected = 0.0
    for position, target in ((1, 9), (5, 7)):  # the second answer token of either row
        chosen = logits[position, columns]
        expected -= chosen.log_softmax(0)[columns.index(target)] / 2
    torch.testing.assert_close(found, expected)


def test_from_the_label_words_the_bce_is_the_loss_between_the_words(tiny, rows):
    """Fails if the claim in docs/results.md is wrong: with a head at the label words, LoRA's
    gradient from the BCE is that from the cross-entropy of the two words."""
    prompts = Prompts(tiny)
    model = make(tiny)
    model.start_head(prompts.label_ids)
    explained = [row for row in rows if "explanation" in row][:4]
    batch = collate(encode_rows(explained, prompts))
    lora = list(model.parameters_by_part()["lora"].values())
    z, logits = model(batch)
    bce = joint_loss(z, batch.labels, logits, batch.targets, 4, 1)["bce"]
    words = label_loss(logits, batch, prompts.label_ids, "words", 4)
    pairs = zip(torch.autograd.grad(bce, lora, retain_graph=True),
                torch.autograd.grad(words, lora), strict=True)
    torch.testing.assert_close(bce, words)
    for from_head, from_words in pairs:
        torch.testing.assert_close(from_head, from_words, atol=1e-6, rtol=1e-4)


def test_what_trains_is_a_partition(fresh):
    """Fails if the head is frozen, the base trains, or a parameter is in no group or in two."""
    groups = fresh.parameters_by_part()
    names = [name for group in groups.values() for name in group]
    assert sorted(names) == sorted(name for name, _ in fresh.named_parameters())
    assert list(groups["head"]) == ["score.weight"]
    assert len(groups["lora"]) == 2 * 7 * 2 and all(".lora_" in name for name in groups["lora"])
    for kind, group in groups.items():
        assert {p.requires_grad for p in group.values()} == {kind != "frozen"}
        assert kind == "frozen" or {p.dtype for p in group.values()} == {torch.float32}


def test_what_another_read_out_learns_trains_with_the_head(fresh):
    """Fails if a parameter that a fork adds to CLSGen is not trained or not saved."""
    fresh.pool = torch.nn.Linear(3, 1)
    head = fresh.parameters_by_part()["head"]
    assert list(head) == ["score.weight", "pool.weight", "pool.bias"]
    tensors = adapter_tensors(fresh)
    assert "base_model.model.pool.bias" in tensors
    assert lora_alone(tensors).keys() == tensors.keys() - {PREFIX + name for name in head}


def test_a_step_moves_lora_and_head_and_leaves_the_base(tiny, rows, fresh):
    """Fails if the score head gets no gradient, its start is zero (then A gets none from BCE), or a
    base weight moves."""
    groups = fresh.parameters_by_part()
    trained = groups["lora"] | groups["head"]
    before = {name: p.detach().clone() for name, p in fresh.named_parameters()}
    optimizer = torch.optim.Adam(trained.values(), lr=0.01)  # AdamW decays what has no gradient
    batch = collate(encode_rows(rows[:4], Prompts(tiny), with_answers=False))  # the score head only
    for _ in range(2):
        optimizer.zero_grad()
        z, logits = fresh(batch)
        terms = joint_loss(z, batch.labels, logits, batch.targets, 4, 0)
        total_loss(terms, {}).backward()
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
        terms = joint_loss(z, batch.labels, logits, batch.targets, *counts)
        total_loss(terms, {"bce": 1.0, "lm": 0.7}).backward()
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
    terms = joint_loss(z, y, logits, targets, 3, 7)
    assert list(terms) == ["bce", "lm"]
    torch.testing.assert_close(terms["bce"], F.binary_cross_entropy_with_logits(z, y))
    torch.testing.assert_close(terms["lm"], F.cross_entropy(logits, targets))
    loss = total_loss(terms, {"bce": 2.0, "lm": 0.5})
    torch.testing.assert_close(loss, 2 * terms["bce"] + 0.5 * terms["lm"])
    terms = joint_loss(z, y, logits[:0], targets[:0], 3, 0)
    loss = total_loss(terms, {"bce": 0.0, "lm": 1.0})
    loss.backward()
    assert terms["lm"] == 0 and loss == 0 and torch.equal(z.grad, torch.zeros(3))
    terms["third"] = z.sum()  # a fork's own term counts without a weight of its own
    torch.testing.assert_close(total_loss(terms, {"bce": 0.0, "lm": 1.0}), z.sum())


@pytest.mark.parametrize("label", [2.0, -1.0, 0.5])
def test_binary_cross_entropy_refuses_other_labels(label):
    """Fails if a label that is not 0 or 1 trains the head all the same, as PyTorch allows."""
    nothing = torch.zeros(0, 11), torch.zeros(0, dtype=torch.long)
    with pytest.raises(ValueError, match="expected 0 or 1"):
        joint_loss(torch.zeros(2), torch.tensor([1.0, label]), *nothing, 2, 0)


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
    z, _ = run.model(collate(encode_rows(rows[:6], run.prompts, with_answers=False)))
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
    run.fitted.threshold = threshold
    for record in run.predict(rows[:4], decide="head"):
        assert record["agree"] and record["stated_label"] == record["label"] == (threshold == 0)


@pytest.mark.parametrize("temperature, top_p, weights", [
    (1.0, 0.6, [0.5, 0.3, 0, 0]), (1.0, 0.5, [0.5, 0, 0, 0]),
    (0.5, 1.0, [0.25, 0.09, 0.0225, 0.0025])])
def test_sampling_keeps_to_the_nucleus(temperature, top_p, weights):
    """Fails if top-p keeps tokens beyond the mass, drops the one that reaches it, or if the
    temperature is not a divisor."""
    logits = torch.log(torch.tensor([[0.5, 0.3, 0.15, 0.05]])).repeat(4000, 1)
    drawn = choose_token(logits, temperature, top_p, torch.Generator().manual_seed(0))
    due = torch.tensor(weights) / sum(weights)
    torch.testing.assert_close(drawn.bincount(minlength=4) / 4000, due, atol=0.03, rtol=0)
