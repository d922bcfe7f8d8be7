"""Prompts and answers as token ids: frames, the cut, label words, the label that a text states."""

import json
import re

import pytest
from conftest import assert_refused, make_run, run_script, write_model, write_tokenizer
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer

from data import encode_rows
from plumbing.model_checks import check_base
from prompts import Prompts, stated_label
from run import load_run


def test_a_long_text_loses_its_middle_and_nothing_else(tiny):
    """Fails if the cut takes tokens from frame or question, from one end, or miscounts."""
    text = " ".join(f"w{i}" for i in range(60))
    whole, cut = Prompts(tiny, question="Will it die?").prompt(text)
    assert cut == 0
    empty = Prompts(tiny, question="Will it die?").prompt("")[0]
    start = next(i for i in range(len(empty)) if empty[i] != whole[i])  # the text's first token
    for bound in (len(whole), len(whole) - 1, len(whole) - 30, len(whole) - 60):
        prompts = Prompts(tiny, question="Will it die?", max_prompt=bound)
        ids, cut = prompts.prompt(text)
        assert len(ids) == bound and cut == len(whole) - bound
        same = next((i for i in range(bound) if ids[i] != whole[i]), bound)
        assert ids[same:] == whole[same + cut :]  # one gap
        left = start + (len(whole) - len(empty) - cut + 1) // 2
        assert ids == whole[:left] + whole[left + cut :]  # as much of the text on either side
        shown = prompts.tokenizer.decode(ids, skip_special_tokens=False)
        assert "Will it die?\n\nw0" in shown and shown.rstrip().endswith("<|im_start|>assistant")
    assert "w29" not in shown  # the gap is in the text's middle
    with pytest.raises(ValueError, match="no room"):
        Prompts(tiny, max_prompt=20).prompt(text)


def test_the_prompt_does_not_depend_on_the_answer(tiny):
    """Fails if one bound holds for both, so that a long explanation cuts the text: a label leak."""
    prompts, row = Prompts(tiny, max_prompt=150), {"id": 1, "text": "w " * 99, "label": 1}
    short, long = encode_rows([row | {"explanation": e} for e in ("a", "b " * 60)], prompts)
    assert short.prompt == long.prompt and short.tokens_cut == long.tokens_cut > 0
    with pytest.raises(ValueError, match="row 1: the answer takes"):
        encode_rows([row | {"explanation": "b " * 200}], Prompts(tiny, max_answer=64))


def test_plain_and_unknown_frames(tmp_path):
    """Fails if a tokenizer without chat tokens does not get `plain`, a frame without its tokens is
    accepted, or a token id beyond the embedding or a row beyond the positions gets through."""
    write_tokenizer(tmp_path, added=("<eos>",))
    config = {"eos_token_id": [0, 5], "vocab_size": 400, "max_position_embeddings": 2048}
    for key, value, words in (
            ("vocab_size", 280, "but the tokenizer needs"),
            ("max_position_embeddings", 99, "--max-prompt 1024 and --max-answer 256 need 1280"),
            ("max_position_embeddings", 300, "--max-prompt 44 would fit")):
        (tmp_path / "config.json").write_text(json.dumps({**config, key: value}))
        with pytest.raises(ValueError, match=f"{key} is {value}.*{words}"):
            Prompts(tmp_path)
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompts = Prompts(tmp_path)
    assert prompts.format == "plain" and prompts.stop_ids == [0, 5]
    assert prompts.decode(prompts.prompt("a text")[0]).endswith("a text\n\nAnswer:\n")
    with pytest.raises(ValueError, match="no token <|im_start|>"):
        Prompts(tmp_path, format="chatml")
    with pytest.raises(ValueError, match="two different words"):
        Prompts(tmp_path, labels=("Yes", "yes"))
    (tmp_path / "tokenizer.json").write_text("{")
    with pytest.raises(ValueError, match="tokenizer.json"):
        Prompts(tmp_path)


def test_the_label_that_an_answer_states(tiny):
    """Fails if the form that training writes is read otherwise, a word anywhere, or one that only
    begins like a label, counts as a statement, or "not likely" is read as the label "not"."""
    for answer, due in {
        "Yes. It is.": (1, "It is."), "no: none": (0, "none"), " YES": (1, ""), "": (None, ""),
        "No , but": (0, "but"), "Not sure.": (None, "Not sure."),
        "I say yes.": (None, "I say yes."), "Yesterday it": (None, "Yesterday it"),
        "No doubt. Yes.": (None, "No doubt. Yes."),
        "Yes. No. It is.": (1, "No. It is."), 'Yes. "Bad" it is.': (1, '"Bad" it is.'),
        "Yes.\n\n(64) *is*": (1, "(64) *is*"), "No. - 5": (0, "- 5"), "Yes. ": (1, ""),
        "no," * 5000: (0, ("no," * 4999)),
    }.items():
        assert Prompts(tiny).parse(answer) == due
    prompts = Prompts(tiny, labels=("likely", "likely, not"))
    assert prompts.parse("Likely, not. Why?") == (1, "Why?")
    assert prompts.parse("likely. x") == (0, "x")


PAIRS = (("no", "yes"), ("no", "no risk"), ("a+b?", "{b}"), ("否", "是"), ("नहीं", "हाँ"), ("0", "1"))
LEADS = ("", "Answer: ", "The answer is ", "the label is: ", "Final answer: ", "**Answer:** ",
         "## Answer\n\n", "The answer to the question is ", "Label: The answer is ")
AROUND = ("{}", '"{}"', "'{}'", "“{}”", "‘{}’", "„{}“", "«{}»", "「{}」", "**{}**", "__{}__",
          "*{}*", "`{}`", "({})", "[{}]", "（{}）", '**"{}"**')
AFTER = (".", ",", ":", ";", "!", "?", "…", " -", " –", "—", "。", "！", "？", "，", "।", "؟", "،",
         "!!", " .", "\n", "\n\n")
TEXTS = ("", "Because it is so.", '"Severe" was said.', "*Severe* it is.", "64 is old.", "否认。")


@given(st.sampled_from(PAIRS), st.integers(0, 1), st.sampled_from([str, str.upper, str.capitalize]),
       st.sampled_from(LEADS), st.sampled_from(AROUND), st.sampled_from(AFTER),
       st.sampled_from(TEXTS), st.booleans())
@settings(max_examples=500, deadline=None)
def test_a_label_is_read_in_whatever_form_it_is_stated(
        pair, label, case, lead, around, after, text, inside):
    """Fails if a form of a label counts as no statement, or a piece of it stays in the text."""
    word = case(pair[label])
    stated = around.format(word) + after
    if inside and after == after.strip():  # a blank or a line break belongs to what follows
        stated = around.format(word + after)
    assert stated_label(f"{lead}{stated} {text}", pair) == (label, text)
    assert stated_label(lead + around.format(word), pair) == (label, "")


@pytest.mark.parametrize("answer", [
    "Yes they do", "Yes because it is", "Yesterday.", "No one came.", "No-one.", "Not.", "Nobody",
    "no'one", "yes's", "yes_no", "yes or no", "Yes/No", "No, yes", "no; yes.", "Yes|No", "Yes\nNo",
    '"Yes" or "no"', "(yes) or (no): x", "yes and no.", "Yes (no).", "no – yes",
    "**No** or **Yes**", "Yes, the answer is no.", "The answer is not yes.", "The answer: maybe.",
    "The answer is no longer known.", "Answer yes or no", "Answering: yes", "no.5 is bad.",
    "no-5", "Is it? Yes.", "I say yes.", "It is a yes.", "...", '""', "**", "Answer:", "yesno"])
def test_what_is_no_statement_of_one_label(answer):
    """Fails if a label is read where another one, or none, may be meant."""
    assert stated_label(f" {answer} ", ("no", "yes")) == (None, answer)


@pytest.mark.parametrize("answer, labels, due", [
    ("1.5 mg", ("0", "1"), None), ("1,000.", ("0", "1"), None), ("1. 5 mg", ("0", "1"), 1),
    ("A patient.", ("a", "b"), None), ("A, B", ("a", "b"), None), ("B) it", ("a", "b"), None),
    ("No risky act.", ("no", "no risk"), None), ("No\nrisk!", ("no", "no risk"), 0),
    ("No, no risk.", ("no", "no risk"), None), ("是的。", ("否", "是"), None),
    ("aab.", ("a+b", "c"), None), ("{yes}.", ("yes", "{yes}"), 1), ("{a}", ("b", "a"), 1),
    ("High-risk.", ("high", "high-risk"), 1), ("High-risky.", ("high", "high-risk"), None),
    ("Yes, no doubt.", ("no", "yes"), 1), ("Yes, yes.", ("no", "yes"), 1)])
def test_words_that_resemble_each_other_or_other_words(answer, labels, due):
    """Fails if a number, another word or the shorter of two words is read as a label."""
    assert stated_label(answer, labels)[0] == due


@pytest.mark.parametrize("settings, words", [
    ({"question": 5}, "question is 5"), ({"labels": ("no", 1)}, "label word is 1"),
    ({"labels": ("no", "yes\n#")}, "expected no line break"),
    ({"labels": ("no", "yes", "no")}, "two different words"), ({"labels": ("no", " ")}, "two"),
    ({"format": "xml"}, "format is 'xml', expected one of chatml-bos, chatml, "),
    ({"format": []}, "format is"),
    ({"max_prompt": 0}, "max-prompt is 0"), ({"max_answer": True}, "max-answer is True")])
def test_settings_are_checked_at_the_door(tiny, settings, words):
    """Fails if a setting of a damaged run folder ends in another exception, or gets through."""
    with pytest.raises(ValueError, match=words):
        Prompts(tiny, **settings)


@pytest.mark.parametrize("eos", [None, [], "2", 2.0, -1, 400, [2, True], [[2]]])
def test_an_answer_must_be_able_to_end(tmp_path, eos):
    """Fails if a base model without an end token, or with one that is no token id, is accepted."""
    write_tokenizer(tmp_path, added=("<eos>",))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": eos, "vocab_size": 400}))
    with pytest.raises(ValueError, match="eos_token_id is "):
        Prompts(tmp_path)


def test_a_model_of_images_too_is_named_as_such(tmp_path):
    """Fails if the wrapper's config, which names no end token, is said to be incomplete."""
    write_tokenizer(tmp_path, added=("<eos>",))
    (tmp_path / "config.json").write_text('{"model_type": "llava", "text_config": {}}')
    with pytest.raises(ValueError, match="model_type is 'llava', a model of images and text"):
        Prompts(tmp_path)


# --- tokens that the model does not know ----------------------------------------------------------
def test_a_token_beyond_the_embedding_is_refused_where_it_is_needed(tmp_path):
    """Fails if an added token without an embedding, which transformers loads, refuses a model, or
    if its id gets into a batch."""
    write_tokenizer(tmp_path)
    tokenizer = Tokenizer.from_file(str(tmp_path / "tokenizer.json"))
    vocab_size = tokenizer.get_vocab_size()
    tokenizer.add_tokens(["<pad>", "Sepsis"])
    tokenizer.save(str(tmp_path / "tokenizer.json"))
    config = {"eos_token_id": 2, "vocab_size": vocab_size}
    (tmp_path / "config.json").write_text(json.dumps(config))
    prompts = Prompts(tmp_path)
    prompts.prompt("a <pad> text")
    for needs in (lambda: prompts.prompt("a Sepsis"), lambda: prompts.answer(1, "Sepsis"),
                  lambda: Prompts(tmp_path, labels=("no", "sepsis"))):
        with pytest.raises(ValueError, match=f"token 'Sepsis' has id {vocab_size + 1}, but"):
            needs()


def set_rows(folder, tensors):
    """Overwrites rows of the tiny model's weights: {tensor: {token id: row or another's id}}."""
    path = folder / "model.safetensors"
    weights = load_file(path)
    for name, rows in tensors.items():
        for token_id, row in rows.items():
            weights[name][token_id] = weights[name][row] if row else 0
    save_file(weights, path, {"format": "pt"})


EMBEDDING, HEAD = "model.embed_tokens.weight", "lm_head.weight"


@pytest.mark.parametrize("tied, rows, refused", [
    (True, {}, None), (False, {}, None),
    (True, {EMBEDDING: {1: None, 2: None}}, "<|im_start|>"),
    (True, {EMBEDDING: {2: None}}, "<|im_end|>"),
    (False, {EMBEDDING: {1: 399}}, "<|im_start|>"),  # a row that fills the matrix up
    (False, {EMBEDDING: {1: 4}}, "<|im_start|>"),  # a reserved token
    (False, {EMBEDDING: {1: 2}}, "<|im_start|>"),  # both have the mean of all rows
    (False, {HEAD: {2: None}}, "<|im_end|>"),  # the text would never end
    (False, {HEAD: {2: 4}}, "<|im_end|>"),
    (False, {HEAD: {1: None}}, None),  # it is only read, never written
    (False, {EMBEDDING: {3: None, 4: None, 399: 398}}, None),  # tokens that no prompt has
    (False, {EMBEDDING: {0: 2}}, None)])  # eos, which ends texts as well
def test_chat_tokens_that_were_never_trained_are_refused(tmp_path, tied, rows, refused):
    """Fails if a base model's chat tokens pass, or if a model that was trained on them does not."""
    write_tokenizer(tmp_path, (*"<|endoftext|> <|im_start|> <|im_end|> <think> <|later|>".split(),))
    write_model(tmp_path, tie_word_embeddings=tied, eos_token_id=[0, 2])
    set_rows(tmp_path, rows)
    if refused is None:
        check_base(Prompts(tmp_path), tmp_path)
    else:
        words = rf"{re.escape(refused)}.*-Instruct model, or --format plain"
        with pytest.raises(ValueError, match=words):
            check_base(Prompts(tmp_path), tmp_path)
    check_base(Prompts(tmp_path, format="plain"), tmp_path)


@pytest.mark.parametrize("script", [
    "data.py ROWS", "train.py --data ROWS --out OUT", "explain.py --data ROWS --out OUT",
    "eval.py --run RUN --data ROWS --out OUT"])
@pytest.mark.parametrize("fault", ["untrained", "adapter"])
def test_every_script_refuses_a_base_that_is_none(run, tiny, rows_file, tmp_path, script, fault):
    """Fails if one of them builds on untrained chat tokens, or without the adapter in the folder;
    or if a run that has such a base already can no longer be loaded."""
    base = tmp_path / "base"
    write_model(base)
    write_tokenizer(base)
    if fault == "untrained":
        set_rows(base, {EMBEDDING: {1: None}})
        words = "never trained on <|im_start|>"
    else:
        (base / "adapter_config.json").write_text("{}")
        words = "holds a LoRA adapter"
    make_run(base, tmp_path / "its")
    names = {"ROWS": rows_file, "OUT": tmp_path / "out", "RUN": tmp_path / "its"}
    done = run_script(*(names.get(word, word) for word in script.split()), "--model", base)
    assert_refused(done, base, words)
    load_run(tmp_path / "its")
