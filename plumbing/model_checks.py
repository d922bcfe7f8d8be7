"""Do a model's folder, its tokenizer and a frame fit together? What does not is refused here."""

import math
import re

from safetensors import safe_open

from plumbing.checkpoint import check_no_adapter, checkpoint_files, positions_of, tensors_in
from plumbing.script import warn


def missing_tokens(frame, tokenizer):
    """The special tokens of the frame that the tokenizer does not have."""
    return [token for token in frame.special_tokens if tokenizer.token_to_id(token) is None]


def check_frame(format, frame, tokenizer):
    """ValueError if the tokenizer lacks a special token of the frame."""
    missing = missing_tokens(frame, tokenizer)
    if missing == ["{bos}"]:
        raise ValueError(f"format {format}: tokenizer_config.json names no bos_token")
    if missing:
        raise ValueError(f"format {format}: the tokenizer has no token {missing[0]}")


def check_model(folder, config, eos_ids, tokenizer, frame, max_prompt, max_answer):
    """ValueError if the tokenizer, the model's config and the frame do not fit together."""
    if "text_config" in config:  # its sizes and end tokens are elsewhere, and so are its weights
        raise ValueError(f"{folder}: model_type is {config.get('model_type')!r}, a model of images "
                         "and text; expected one of text alone")

    # Each token that a text can become needs an embedding. An added token may lack one, as in
    # transformers, as long as nothing needs it: `Prompts._checked`
    added = {token.content for token in tokenizer.get_added_tokens_decoder().values()}
    vocabulary = tokenizer.get_vocab(with_added_tokens=False)
    needed = [vocabulary[token] for token in vocabulary.keys() - added]
    least = 1 + max(needed, default=-1)
    vocab_size = config.get("vocab_size", math.inf)
    if type(vocab_size) not in (int, float) or not vocab_size >= least:  # NaN neither
        raise ValueError(f"{folder}: vocab_size is {vocab_size!r}, but the tokenizer needs {least}")

    # ... and each position must be one that the model knows
    positions = positions_of(config)
    if positions is None:
        positions = math.inf
    if type(positions) not in (int, float) or not positions >= max_prompt + max_answer:
        advice = "lower both"
        if type(positions) is int and positions > max_answer:
            advice = f"--max-prompt {positions - max_answer} would fit"
        raise ValueError(f"{folder}: max_position_embeddings is {positions!r}, but --max-prompt "
                         f"{max_prompt} and --max-answer {max_answer} need "
                         f"{max_prompt + max_answer}; {advice}")

    # An answer must be able to end
    for eos_id in eos_ids:
        if type(eos_id) is not int or not 0 <= eos_id < vocab_size:
            raise ValueError(f"{folder}: eos_token_id is {eos_id!r}, expected a token id")
    if not eos_ids and not frame.special_tokens:
        raise ValueError(f"{folder}: eos_token_id is missing, and nothing else ends an answer")


# --- tokens without training ----------------------------------------------------------------------
def check_base(prompts, folder):
    """ValueError if nothing should be built on this model with these prompts.

    It holds an adapter that would be ignored; or it was never trained on a special token of the
    frame, as base models were not on those of a chat.
    """
    check_no_adapter(folder)
    untrained = untrained_tokens(prompts, folder)
    if untrained:
        raise ValueError(f"{folder}: the model was never trained on {untrained[0]}, which format "
                         f"{prompts.format} needs: take the -Instruct model, or --format plain")


def untrained_tokens(prompts, folder):
    """The frame's special tokens that the model has never been trained on.

    The rule: a token's row of the embedding is zero, or equals, bit for bit, the row of another of
    these tokens or of a token that was surely not trained either. A base model has such rows for
    the tokens of a chat that it has never seen; rows that were trained differ from each other. For
    the end of turn, the rule holds for the row of a separate lm_head too: otherwise no text ends.
    """
    tokens = prompts.frame.special_tokens
    if not tokens:
        return []
    try:
        files = checkpoint_files(folder)
    except ValueError:  # a folder without weights, which is enough to look at rows
        return []
    shapes, file_of = tensors_in(files, ())

    ids = [prompts.tokenizer.token_to_id(token) for token in tokens]
    others = reserved_ids(prompts)
    embedding = matrix_rows("model.embed_tokens.weight", {*ids, *others}, shapes, file_of)
    lm_head = matrix_rows("lm_head.weight", {*ids, *others}, shapes, file_of)

    untrained = [token for token, i in zip(tokens, ids, strict=True) if is_untrained(i, embedding)]
    if is_untrained(ids[-1], lm_head):
        untrained.append(tokens[-1])
    return untrained


def reserved_ids(prompts):
    """The ids of special tokens that neither a prompt nor an answer has."""
    special = set()
    for token_id, token in prompts.tokenizer.get_added_tokens_decoder().items():
        if token.special:
            special.add(token_id)
    return special - set(prompts.stop_ids)


def matrix_rows(name, ids, shapes, file_of):
    """{id: row (D,)} of a (V, D) tensor: these rows, and the last, which may only fill it up.

    No other row is read. {} where there is no such tensor, as of a tied lm_head.
    """
    if len(shapes.get(name, ())) != 2:  # one of other dimensions is for load_llama to refuse
        return {}
    size = shapes[name][0]
    rows = {}
    with safe_open(file_of[name], "pt") as file:
        matrix = file.get_slice(name)
        for token_id in {*ids, size - 1}:
            if 0 <= token_id < size:
                rows[token_id] = matrix[token_id]
    return rows


def is_untrained(token_id, rows):
    """The rule of `untrained_tokens` for one token; rows {id: row (D,)}."""
    row = rows.get(token_id)
    if row is None:
        return False
    if row.abs().max() < 1e-6:  # which is nothing next to a norm's eps
        return True
    return any(other != token_id and row.equal(rows[other]) for other in rows)


# --- the chat template ----------------------------------------------------------------------------
def warn_of_template(prompts, frames):
    """Prints one line if the folder's chat template has other marks than the frame of the prompts.

    frames: all there are, {name: frame}; the line names one that follows the template.
    """
    chat = prompts.chat
    problem = None
    if chat.template and not prompts.frame.special_tokens:
        problem = "the model has a chat template, which format plain does not follow"
    elif chat.template:
        absent = [mark for mark in marks(prompts.frame) if not chat.has(mark)]
        if absent:
            problem = f"format {prompts.format}: the model's chat template has no {absent[0]}"
        elif chat.adds_bos_to(prompts.frame):
            problem = f"format {prompts.format}: the model's chat template begins with {chat.bos}"
    if problem is None:
        return

    advice = "no other --format follows it"
    for name, frame in frames.items():
        follows = marks(frame) and all(map(chat.has, marks(frame)))
        if follows and name != prompts.format and not missing_tokens(frame, prompts.tokenizer):
            advice = f"--format {name} does"
            break
    warn(f"{problem}; {advice}")


def marks(frame):
    """The marks in a frame's prompt: special tokens, and <<SYS>> or [INST] where they are text."""
    return re.findall(r"<</?SYS>>|\[/?[A-Z_]+\]|<[^<>\s]+>", frame.prompt)
