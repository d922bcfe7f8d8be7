"""Teachers: each writes texts about rows, and scores texts. explain.py asks them."""

import os
import re

import torch

from clsgen import CLSGen, choose_token
from data import encode_rows
from plumbing.chat import Server
from plumbing.checkpoint import load_llama
from plumbing.model_checks import check_base
from plumbing.packed import pack
from plumbing.script import pick_device
from prompts import SYSTEM, Prompts, stated_label
from run import Fitted, Run


class LocalTeacher:
    """A model folder as the teacher."""

    def __init__(self, args):
        prompts = Prompts.from_arguments(args)
        check_base(prompts, args.model)
        dtype, device = pick_device(args.dtype, None)
        llama = pack(load_llama(args.model, dtype, device))
        by_label_words = Fitted(scorer="label_token")  # it has no score head to ask
        self.run = Run(CLSGen(llama), prompts, by_label_words, has_lora=False)
        self.args = args

    def write(self, texts, seeds):
        """What it says to each text below the question, drawn with that text's own seed.

        None where the bound on tokens came before it said anything.
        """
        prompts = self.run.prompts
        temperature = self.args.temperature
        top_p = self.args.top_p
        generators = [torch.Generator().manual_seed(seed) for seed in seeds]

        def choose(logits):  # each row by its own draws, whatever else is in the batch
            tokens = []
            for row, generator in zip(logits, generators, strict=True):
                tokens.append(choose_token(row[None], temperature, top_p, generator))
            return torch.cat(tokens)

        examples = encode_rows([{"id": None, "text": text} for text in texts], prompts)
        reading = self.run.read(examples)
        steps = list(self.run.write(reading, choose=choose))  # of (B,) each

        answers = []
        for ids in torch.stack(steps, dim=1).tolist():
            said = [token for token in ids if token not in prompts.stop_ids]
            # A special token in the middle must show: the check "markup" is to find it
            answer = prompts.tokenizer.decode(said, skip_special_tokens=False)
            has_ended = len(said) < len(ids)  # there is a stop token
            answers.append(what_it_says(answer, cut_off=not has_ended))
        return answers

    def score(self, texts):
        """The label-token score of each text below the question: p of class 1."""
        records = self.run.predict(texts, explain=False, batch_size=self.args.batch)
        return [record["probability"] for record in records]


class ServerTeacher:
    """The same from a server that speaks OpenAI's protocol."""

    def __init__(self, args):
        self.args = args
        self.server = Server(args.endpoint, key_of(args), args.timeout, args.retries)

    def write(self, texts, seeds):
        """What it says to each text below the question; None as from a `LocalTeacher`."""
        answers = []
        for text, seed in zip(texts, seeds, strict=True):
            answers.append(self.ask(text, self.args.temperature, seed))
        return answers

    def score(self, texts):
        """1 or 0 for the label that it states, .5 where it states none: a server tells no p."""
        no, yes = self.args.labels
        scores = []
        for text in texts:
            asked = f'{text}\n\nAnswer with one word, "{no}" or "{yes}".'
            answer = self.ask(asked, 0, self.args.seed)
            label, _ = stated_label(answer or "", self.args.labels)
            scores.append(0.5 if label is None else float(label))
        return scores

    def ask(self, text, temperature, seed):
        """One answer to a text below the question, as `write` gives it.

        ValueError if there is none, of the kind Refused if it is for this text alone.
        """
        args = self.args
        half = 2 * args.max_prompt  # in characters: a token has about four
        if len(text) > 2 * half:
            text = f"{text[:half]} ... {text[-half:]}"

        body = {
            "model": args.teacher,
            "messages": [
                {"role": "system", "content": SYSTEM},
                {"role": "user", "content": f"{args.question}\n\n{text}"},
            ],
            "max_tokens": args.max_answer,
            "temperature": temperature,
            "top_p": args.top_p,
            "seed": seed,
        }
        answer, cut_off = self.server.complete(body)
        return what_it_says(answer, cut_off)


# How models mark where their thinking begins, and where it is over
THINKING_BEGINS = re.compile(
    r"<(?:think|thinking|thought|reasoning)>|\[THINK\]|◁think▷|<\|START_THINKING\|>"
    r"|<\|channel\|>analysis",
    re.IGNORECASE,
)
THINKING_ENDS = re.compile(
    r"</(?:think|thinking|thought|reasoning)>|\[/THINK\]|◁/think▷|<\|END_THINKING\|>"
    r"|<\|channel\|>final<\|message\|>",
    re.IGNORECASE,
)


def what_it_says(answer, cut_off):
    """An answer without the thinking before it, and without bold.

    A thought that does not end says nothing. None if nothing is said because it was cut off.
    """
    said = THINKING_ENDS.split(answer)[-1]
    said = THINKING_BEGINS.split(said)[0]
    said = said.replace("**", "").strip()
    if cut_off and not said:
        return None
    return said


def key_of(args):
    """The key for the endpoint, from the environment variable that --key-env names; else ""."""
    return os.environ.get(args.key_env or "", "").strip()
