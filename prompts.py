"""Text to token ids and back: the prompt that the model reads, the answer that it writes.

A row becomes two lists of token ids, here in the frame named chatml:

    <|im_start|>system                                  | prompt: frame, system line,
    Answer the question, then explain why.<|im_end|>    | question and text. The score head
    <|im_start|>user                                    | reads its last token.
    Is the answer yes for the following text?           |
                                                        |
    (the row's text)<|im_end|>                          |
    <|im_start|>assistant                               |
    Yes. Because ...<|im_end|>                          | answer: label word, explanation,
                                                        | end of turn

A prompt that is too long loses tokens of the row's text, and nothing else.
"""

import math
import re
from copy import copy
from dataclasses import dataclass, replace

from plumbing.checkpoint import model_file
from plumbing.files import read_json
from plumbing.model_checks import check_frame, check_model, missing_tokens, warn_of_template
from plumbing.tokenizer_files import encode, ids_around, load_tokenizers, read_chat, read_eos_ids

QUESTION = "Is the answer yes for the following text?"
SYSTEM = "Answer the question, then explain why."


# --- frames ---------------------------------------------------------------------------------------
@dataclass(frozen=True)
class Frame:
    """The text around a prompt, as a family of models knows it from its chat template."""

    special_tokens: tuple  # the tokenizer must have them; the last one ends an answer
    prompt: str  # with {system} for the system line, and {user} for question, blank line, text
    inst_is_text: bool = False  # [INST] is no token of its own, so a row's text could imitate it
    only_if: tuple = ()  # functions of (tokenizer, chat): it is chosen where all are true


def is_byte_level(tokenizer, chat):
    """Whether the tokenizer is of the byte-level kind, which writes a blank as a letter, Ġ."""
    tokens = tokenizer.encode("a a", add_special_tokens=False).tokens
    return "Ġ" in "".join(tokens)


def uses_system_prompt(tokenizer, chat):
    """Whether the chat template has [SYSTEM_PROMPT]. Some tokenizers only keep a place for it."""
    return not chat.template or chat.has("[SYSTEM_PROMPT]")


def chatml_follows_bos(tokenizer, chat):
    """Whether the folder's chat template has a start token that ChatML itself lacks."""
    return chat.adds_bos_to(FRAMES["chatml"])


# A new frame is one entry here. The order counts: a tokenizer gets the first frame whose tokens it
# has, and whose only_if are true. "plain" needs none, so the frames below it must be named with
# --format. A run remembers the name of its frame, so a frame that is here never changes: another
# layout gets another name.
#
# The token ids equal those of the models' own chat templates for [system, user], but for the
# differences that docs/models.md lists.
#
# {bos} is the token that tokenizer_config.json calls bos_token.
FRAMES = {
    "chatml-bos": Frame(  # ChatML on a model of another family, such as Hermes on Llama-3
        special_tokens=("{bos}", "<|im_start|>", "<|im_end|>"),
        prompt="{bos}<|im_start|>system\n{system}<|im_end|>\n"
               "<|im_start|>user\n{user}<|im_end|>\n"
               "<|im_start|>assistant\n",
        only_if=(chatml_follows_bos,),
    ),
    "chatml": Frame(  # SmolLM2, SmolLM3, Qwen2.5, Qwen3
        special_tokens=("<|im_start|>", "<|im_end|>"),
        prompt="<|im_start|>system\n{system}<|im_end|>\n"
               "<|im_start|>user\n{user}<|im_end|>\n"
               "<|im_start|>assistant\n",
    ),
    "llama3": Frame(  # Llama-3 and later
        special_tokens=(
            "<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"
        ),
        prompt="<|begin_of_text|>"
               "<|start_header_id|>system<|end_header_id|>\n\n{system}<|eot_id|>"
               "<|start_header_id|>user<|end_header_id|>\n\n{user}<|eot_id|>"
               "<|start_header_id|>assistant<|end_header_id|>\n\n",
    ),
    "granite": Frame(  # Granite 3
        special_tokens=("<|start_of_role|>", "<|end_of_role|>", "<|end_of_text|>"),
        prompt="<|start_of_role|>system<|end_of_role|>{system}<|end_of_text|>\n"
               "<|start_of_role|>user<|end_of_role|>{user}<|end_of_text|>\n"
               "<|start_of_role|>assistant<|end_of_role|>",
    ),
    "seed": Frame(  # Seed-OSS
        special_tokens=("<seed:bos>", "<seed:eos>"),
        prompt="<seed:bos>system\n{system}<seed:eos>"
               "<seed:bos>user\n{user}<seed:eos>"
               "<seed:bos>assistant\n",
    ),
    "mistral-v7-tekken": Frame(  # Mistral-Small-24B-2501
        special_tokens=("<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "</s>"),
        prompt="<s>[SYSTEM_PROMPT]{system}[/SYSTEM_PROMPT][INST]{user}[/INST]",
        only_if=(is_byte_level, uses_system_prompt),
    ),
    "mistral-v7": Frame(  # Mistral-Large-2411
        special_tokens=("<s>", "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]", "</s>"),
        prompt="<s>[SYSTEM_PROMPT] {system}[/SYSTEM_PROMPT][INST] {user}[/INST]",
        only_if=(uses_system_prompt,),
    ),
    "mistral-tekken": Frame(  # Mistral-Nemo
        special_tokens=("<s>", "[INST]", "[/INST]", "</s>"),
        prompt="<s>[INST]{system}\n\n{user}[/INST]",
        only_if=(is_byte_level,),
    ),
    "mistral": Frame(  # Mistral 7B v0.3
        special_tokens=("<s>", "[INST]", "[/INST]", "</s>"),
        prompt="<s>[INST] {system}\n\n{user}[/INST]",
    ),
    "plain": Frame(  # base models, which know no chat
        special_tokens=(),
        prompt="{system}\n\n{user}\n\nAnswer:\n",
    ),
    "llama2": Frame(  # Llama-2 chat
        special_tokens=("<s>", "</s>"),
        prompt="<s>[INST] <<SYS>>\n{system}\n<</SYS>>\n\n{user} [/INST]",
        inst_is_text=True,
    ),
    "mistral-v1": Frame(  # Mistral 7B v0.1 and v0.2
        special_tokens=("<s>", "</s>"),
        prompt="<s> [INST] {system}\n\n{user} [/INST]",
        inst_is_text=True,
    ),
}


# --- prompts and answers --------------------------------------------------------------------------
class Prompts:
    """Rows to token ids and back, for one tokenizer, one question and one pair of label words.

    A row's text never acts as markup. It is encoded by a tokenizer that knows no added tokens but
    ordinary words, so "<|im_end|>" in a text is ordinary characters. Where [INST] and <<SYS>> are
    no tokens of their own, a space breaks them in the text. (`plain` has no marks to protect.)

    ValueError where the settings, the tokenizer or the model's config do not fit together.
    """

    def __init__(self, folder, question=QUESTION, labels=("no", "yes"), format=None,
                 max_prompt=1024, max_answer=256):
        # What can be refused is refused here
        check_settings(question, labels, format, max_prompt, max_answer)
        config = read_json(model_file(folder, "config.json"))
        eos_ids = read_eos_ids(folder, config)
        self.chat = read_chat(folder)
        # The whole tokenizer knows the special tokens, and decodes. The other two know plain text
        # only: one for a text that stands at the beginning (answers, label words), one for a text
        # that follows a special token (prompts). They differ where the tokenizer puts a blank first
        tokenizers = load_tokenizers(model_file(folder, "tokenizer.json"), self.chat.template)
        self.tokenizer, self.answer_tokenizer, self.prompt_tokenizer = tokenizers
        if format is None:
            format = choose_format(self.tokenizer, self.chat)
        self.frame = frame_of(format, self.chat)
        check_frame(format, self.frame, self.tokenizer)
        check_model(folder, config, eos_ids, self.tokenizer, self.frame, max_prompt, max_answer)

        self.question = question
        self.labels = tuple(word.strip() for word in labels)
        self.format = format
        self.max_prompt = max_prompt  # tokens
        self.max_answer = max_answer  # tokens, the end of turn included
        self.vocab_size = config.get("vocab_size", math.inf)

        # The frame as token ids. The text of `plain` follows no special token of the frame, so it
        # is encoded as a text at the beginning
        if not self.frame.special_tokens:
            self.prompt_tokenizer = self.answer_tokenizer
        parts = self._lay_out_frame()
        self.ids_before, self.text_before, self.text_after, self.ids_after = parts

        # What ends an answer; training writes the first: the frame's end of turn, else eos
        stop_ids = eos_ids
        if self.frame.special_tokens:
            end_of_turn = self.tokenizer.token_to_id(self.frame.special_tokens[-1])
            stop_ids = [end_of_turn, *eos_ids]
        self.stop_ids = list(dict.fromkeys(stop_ids))  # each once, in this order
        self._checked(self.ids_before + self.ids_after + self.stop_ids)

        # "No." and "Yes.": the label-token score is the difference of their log-probabilities. All
        # that reads them relies on answers that begin with just these tokens: `answer` checks it
        self.label_ids = []
        for label in range(len(self.labels)):
            ids = encode(self.answer_tokenizer, self.word(label) + ".").ids
            self.label_ids.append(self._checked(ids))

    @classmethod
    def from_arguments(cls, args):
        """The prompts that a script's arguments ask for.

        args has `model`, the folder, and the flags of `add_prompt_arguments`. Warns if the frame is
        another than the folder's chat template has.
        """
        # a training of an earlier version may have a blank question, and has to continue
        is_resumed = getattr(args, "resume", None) is not None
        if not args.question.strip() and not is_resumed:
            raise ValueError("--question is blank, expected the question that p answers")
        prompts = cls(args.model, args.question, args.labels, args.format, args.max_prompt,
                      args.max_answer)
        if args.format != "plain":  # who asks for it knows
            frames = {name: frame_of(name, prompts.chat) for name in FRAMES}
            warn_of_template(prompts, frames)
        return prompts

    def with_instruction(self, instruction):
        """A copy of these prompts that has an instruction below the row's text."""
        prompts = copy(self)
        prompts.text_after = f"\n\n{instruction}{self.text_after}"
        return prompts

    def settings(self):
        """What a run has to remember: Prompts(folder, **settings) builds the same prompts again."""
        return {
            "question": self.question,
            "labels": self.labels,
            "format": self.format,
            "max_prompt": self.max_prompt,
            "max_answer": self.max_answer,
        }

    def rendered(self):
        """The prompt as text, for tools that do not have this file.

        It is before_text, then the row's text, then after_text. The special tokens are there
        already, so a tokenizer must add none; only for `plain` it adds its start token. If it
        appends tokens there too, the last `end_tokens` ids have to go. stop_ids end an answer.
        """
        before, after = self.frame.prompt.replace("{system}", SYSTEM).split("{user}")
        is_plain = not self.frame.special_tokens
        _, end_ids = ids_around(self.tokenizer)
        return {
            "before_text": before + self.question + "\n\n",
            "after_text": after,
            "add_special_tokens": is_plain,
            "end_tokens": len(end_ids) if is_plain else 0,
            "stop_ids": self.stop_ids,
        }

    def _lay_out_frame(self):
        """The four parts of the frame around the row's text, in their order.

            ids_before | text_before, (the row's text), text_after | ids_after

        Each stretch of plain text between two special tokens is tokenised in one call, because
        tokens can span its parts. So the plain text around the row's text stays text here, and
        `prompt` encodes the three together.
        """
        pieces = split_at(self.frame.special_tokens, self.frame.prompt.replace("{system}", SYSTEM))
        user_piece = next(piece for piece in pieces if "{user}" in piece)
        where = pieces.index(user_piece)

        ids_before = self._frame_ids(pieces[:where])
        ids_after = self._frame_ids(pieces[where + 1 :])
        if not self.frame.special_tokens:
            start_ids, _ = ids_around(self.tokenizer)
            ids_before = start_ids + ids_before

        start, text_after = user_piece.split("{user}")
        text_before = start + self.question + "\n\n"
        return ids_before, text_before, text_after, ids_after

    def _frame_ids(self, pieces):
        """The token ids of a frame's pieces: special tokens, and plain text between them."""
        ids = []
        for piece in pieces:
            if piece in self.frame.special_tokens:
                ids.append(self.tokenizer.token_to_id(piece))
            else:
                ids += encode(self.prompt_tokenizer, piece).ids
        return ids

    def prompt(self, text):
        """A row's text as (the prompt's token ids, how many tokens of the text were cut).

        A prompt over max_prompt loses tokens from the middle of the text, never from frame or
        question. The bound does not look at the answer (answers differ in length by class): a cut
        that did would leak the label. ValueError if nothing of the text would be left.
        """
        if self.frame.inst_is_text:
            text = re.sub(r"(\[/?|<</?)(INST\]|SYS>>)", r"\1 \2", text)

        encoded = encode(self.prompt_tokenizer, self.text_before + text + self.text_after)
        ids = encoded.ids
        surplus = len(self.ids_before) + len(ids) + len(self.ids_after) - self.max_prompt
        if surplus <= 0:
            return self._checked(self.ids_before + ids + self.ids_after), 0

        # Too long: the text's own tokens are those whose offsets lie within it
        start = len(self.text_before)
        end = start + len(text)
        own = []
        for index, (first, last) in enumerate(encoded.offsets):
            if start <= first and last <= end:
                own.append(index)
        if surplus >= len(own):
            least = self.max_prompt + surplus - len(own)
            raise ValueError(f"--max-prompt {self.max_prompt} leaves no room for the text: "
                             f"frame and question alone take {least} tokens")

        # ... and a gap in their middle makes it as long as it may be
        gap = own[(len(own) - surplus + 1) // 2]
        ids = ids[:gap] + ids[gap + surplus :]
        return self._checked(self.ids_before + ids + self.ids_after), surplus

    def answer(self, label, explanation):
        """The token ids of "Yes. Because ..." and the end of turn."""
        text = f"{self.word(label)}. {explanation.strip()}"
        ids = encode(self.answer_tokenizer, text).ids
        opening = self.label_ids[label]
        if ids[: len(opening)] != opening:
            raise ValueError(f"the tokenizer joins {self.word(label)!r} with what follows it in "
                             f"{text[:60]!r}: choose other --labels")
        return self._checked(ids + self.stop_ids[:1])

    def _checked(self, ids):
        """The same token ids. ValueError if the model has no embedding for one of them."""
        highest = max(ids)
        if highest >= self.vocab_size:
            raise ValueError(f"the token {self.tokenizer.id_to_token(highest)!r} has id {highest}, "
                             f"but the model's vocab_size is {self.vocab_size}")
        return ids

    def word(self, label):
        """The label's word with its first letter in upper case: 1 gives "Yes"."""
        word = self.labels[label]
        return word[0].upper() + word[1:]

    def decode(self, ids):
        """The text of token ids, without what ends an answer and without special tokens."""
        return self.tokenizer.decode([i for i in ids if i not in self.stop_ids])

    def parse(self, answer):
        """An answer's text as (the label that it states or None, the explanation after it)."""
        return stated_label(answer, self.labels)


# --- the label that an answer states --------------------------------------------------------------
# What may stand before a label's word: decoration, "Answer:", "The answer is"
BEFORE = r"""
    [\s"'`“”„‘’«»「」『』*_\#>(（\[{]*
    (?: (?: (?:so|the|my|final|correct|right)\s+ )*
        (?: answer|label|verdict|decision|conclusion )
        (?: \s+to\s+the\s+question )?  (?: \s+is\b )?  [\s"'`“”„‘’«»「」『』*_:：(（\[{]* )*
"""
# ... and after it: decoration that ends, and then punctuation, a dash, a new line or nothing
AFTER = r"""
    [)）\]}"'`“”’«»」』*_]*
    (?: \s*[.,:;!?…。，、：；！？।؟۔،؛—–]+ (?!\d) | \s+-+(?=\s) | \s*\n | \s*$ )
    [)）\]}"'`“”’»」』*_]*
"""


def stated_label(answer, labels):
    """An answer as (the label that it states or None, the explanation after it).

    It states a label if it opens with that label's word, in any case and form: "Yes. Because ...",
    "no!", "**Answer:** yes". A word that more words follow at once ("No doubt") states nothing, and
    neither do two labels to choose from ("yes or no", "No, yes").
    """
    label, rest, mark = opening_label(answer, labels)
    if label is not None and "." not in mark:  # a full stop ends the statement
        other, _, _ = opening_label(rest, labels)
        if other not in (None, label):
            label = None
    if label is None:
        return None, answer.strip()
    return label, rest


def opening_label(text, labels):
    """(the label whose word opens a text, what follows, what is between), else (None, text, "").

    The longest word is tried first, since one may begin with the other.
    """
    for word in sorted(labels, key=len, reverse=True):
        pattern = f"{BEFORE} {re.escape(word)} (?P<mark> {AFTER} )"
        match = re.match(pattern, text, re.IGNORECASE | re.VERBOSE)
        if match:
            return labels.index(word), text[match.end() :].strip(), match["mark"]
    return None, text, ""


# --- frames and tokenizers ------------------------------------------------------------------------
def choose_format(tokenizer, chat):
    """The name of the first frame whose tokens the tokenizer has, and whose only_if are true."""
    for name in FRAMES:
        frame = frame_of(name, chat)
        if missing_tokens(frame, tokenizer):
            continue
        if all(fits(tokenizer, chat) for fits in frame.only_if):
            return name


def frame_of(format, chat):
    """The frame of this name, with the model's bos_token where it has {bos}."""
    frame = FRAMES[format]
    if not chat.bos:
        return frame
    tokens = tuple(token.replace("{bos}", chat.bos) for token in frame.special_tokens)
    prompt = frame.prompt.replace("{bos}", chat.bos)
    return replace(frame, special_tokens=tokens, prompt=prompt)


def split_at(special_tokens, text):
    """The text in pieces: its special tokens, and what is between them."""
    if not special_tokens:
        return [text]
    pattern = "|".join(map(re.escape, special_tokens))
    return [piece for piece in re.split(f"({pattern})", text) if piece]


# --- what is refused ------------------------------------------------------------------------------
def check_settings(question, labels, format, max_prompt, max_answer):
    """ValueError if no prompt can be made with one of the settings."""
    if not isinstance(question, str):
        raise ValueError(f"question is {question!r}, expected a string")

    # One logit has two sides, so there are two words
    words = set()
    for word in labels:
        if not isinstance(word, str):
            raise ValueError(f"label word is {word!r}, expected a string")
        if not word.strip().isprintable():
            raise ValueError(f"label word is {word!r}, expected no line break and no control "
                             "character")
        words.add(word.strip().lower())
    if len(labels) != 2 or len(words - {""}) != 2:
        raise ValueError(f"labels are {labels!r}, expected two different words")

    if format not in (None, *FRAMES):
        raise ValueError(f"format is {format!r}, expected one of {', '.join(FRAMES)}")

    for name, bound in (("max-prompt", max_prompt), ("max-answer", max_answer)):
        if type(bound) is not int or bound < 1:
            raise ValueError(f"{name} is {bound!r}, expected a whole number of at least 1")


# --- flags ----------------------------------------------------------------------------------------
def add_prompt_arguments(parser):
    """Adds the flags that make a prompt: the same in every script that encodes rows."""
    parser.add_argument("--question", default=QUESTION, help="asked above every text")
    add = parser.add_argument_group("the prompt").add_argument
    add("--labels", nargs=2, default=["no", "yes"], metavar=("ZERO", "ONE"),
        help="the words of class 0 and class 1")
    add("--format", choices=FRAMES, metavar="FRAME", help=f"chat frame, one of {', '.join(FRAMES)} "
        "(default: by the tokenizer's special tokens)")
    add("--max-prompt", type=int, default=1024, help="tokens; the middle of a longer text is cut")
    add("--max-answer", type=int, default=256,
        help="most tokens of an answer; a longer one in training data is an error")
