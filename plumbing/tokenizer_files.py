"""What a model's folder says about its text: the tokenizer, the chat template, the end tokens."""

import json
import re
from dataclasses import dataclass
from pathlib import Path

from tokenizers import Tokenizer

from plumbing.files import read_json


# --- tokenizers -----------------------------------------------------------------------------------
def load_tokenizers(path, template=""):
    """Three tokenizers from one tokenizer.json: (the whole one, a text's, a frame's).

    The whole one knows the special tokens and decodes. The other two know no added tokens but
    ordinary words, so what they encode is text and nothing else: the second a text that stands
    alone, the third a text that follows a special token. They differ for tokenizers of the
    SentencePiece kind, where the scheme "first" puts a blank before a text that stands alone and
    none after a special token.
    """
    spec = read_json(path)
    whole = make_tokenizer(path, json.dumps(spec))

    # The ids of words have to stay, though other added tokens are gone: the vocabulary keeps them
    words = []
    vocabulary = spec["model"]["vocab"]
    if isinstance(vocabulary, dict):
        for token in spec.get("added_tokens", []):
            if is_ordinary_word(token, template):
                words.append(token)
                vocabulary[token["content"]] = whole.token_to_id(token["content"])

    of_text = json.dumps({**spec, "added_tokens": words})
    # wherever the spec has it; in a token, the quotation marks would be escaped
    in_frame = of_text.replace('"prepend_scheme": "first"', '"prepend_scheme": "never"')
    return whole, make_tokenizer(path, of_text), make_tokenizer(path, in_frame)


def make_tokenizer(path, source):
    """A tokenizer from the text of a tokenizer.json, which the file `path` has."""
    try:
        tokenizer = Tokenizer.from_str(source)
    except KeyboardInterrupt:
        raise
    except BaseException as error:  # tokenizers raises nothing narrower, and panics
        raise ValueError(f"{path}: {error}") from None
    tokenizer.no_padding()
    tokenizer.no_truncation()
    return tokenizer


def is_ordinary_word(token, template):
    """Whether an entry of tokenizer.json's added_tokens may be a token in a row's text.

    Markup may not: a special token, whatever has a bracket or a bar in it, such as <think>, [INST]
    and <|im_end|>, and what stands in the chat template.
    """
    content = token["content"]
    looks_like_markup = re.search(r"[<>\[\]{}|｜]", content)
    is_word = re.search(r"\w", content)
    return is_word and not token["special"] and not looks_like_markup and content not in template


def ids_around(tokenizer):
    """(the ids that the tokenizer itself puts before a text, those that it puts after it).

    For most base models none, for some a start token, an end token for few. As in transformers,
    tokenizer.json's post_processor decides, not tokenizer_config.json.
    """
    before = []
    after = []
    has_begun = False  # the text
    encoded = tokenizer.encode("a")
    for token_id, is_added in zip(encoded.ids, encoded.special_tokens_mask, strict=True):
        if not is_added:
            has_begun = True
        elif has_begun:
            after.append(token_id)
        else:
            before.append(token_id)
    return before, after


def encode(tokenizer, text):
    """The tokens of a text, with ids and offsets; nothing is put before or after it.

    ValueError for half of a surrogate pair, which is no text (it comes from a broken command line).
    """
    text.encode()
    return tokenizer.encode(text, add_special_tokens=False)


# --- what else the folder says --------------------------------------------------------------------
@dataclass(frozen=True)
class Chat:
    """What a folder says about its chat. The template is text to look for words in, never run."""

    template: str  # empty where there is none
    bos: str | None  # what {{ bos_token }} stands for in a template
    eos: str | None

    def has(self, mark):
        """Whether the template has a token or other mark, by its name or as it is."""
        if mark == self.bos and "bos_token" in self.template:
            return True
        if mark == self.eos and "eos_token" in self.template:
            return True
        return mark in self.template

    def adds_bos_to(self, frame):
        """Whether the template has a start token that the frame lacks.

        SmolLM2's is <|im_start|>, which ChatML has anyway.
        """
        return self.bos is not None and self.bos not in frame.prompt and self.has(self.bos)


def read_chat(folder):
    """The Chat of a folder: tokenizer_config.json, and a template in a file of its own."""
    folder = Path(folder)
    config = {}
    if (folder / "tokenizer_config.json").exists():
        config = read_json(folder / "tokenizer_config.json")

    # transformers prefers the file of its own, and of several templates the one named default
    template = config.get("chat_template")
    if (folder / "chat_template.jinja").exists():
        template = (folder / "chat_template.jinja").read_text(encoding="utf-8", errors="replace")
    elif (folder / "chat_template.json").exists():
        template = read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):
        named = [entry for entry in template if isinstance(entry, dict)]
        template = "".join(
            str(entry.get("template")) for entry in named if entry.get("name") == "default")
    if not isinstance(template, str):
        template = ""
    return Chat(template, token_of(config, "bos_token"), token_of(config, "eos_token"))


def token_of(config, name):
    """The text of a token that a tokenizer_config.json names, or None."""
    token = config.get(name)
    if isinstance(token, dict):
        token = token.get("content")
    return token if isinstance(token, str) else None


def read_eos_ids(folder, config):
    """What generation_config.json and config.json name as the end of a text: none, one or several.

    `check_model` checks them.
    """
    generation = Path(folder) / "generation_config.json"
    sources = [read_json(generation), config] if generation.exists() else [config]

    eos_ids = []
    for source in sources:
        value = source.get("eos_token_id")
        if isinstance(value, list):
            eos_ids += value
        elif value is not None:
            eos_ids.append(value)
    return eos_ids
