"""The README.md of an exported folder: how to build the prompt and read both heads elsewhere."""

import re

from plumbing.script import printable

TOP = """\
# {title}

It reads a text and answers this question with a probability and an explanation. It is \
{base}, fine-tuned with CLSGen (arXiv 2604.11801). {what}

## The prompt

```python
text = "..."
prompt = (
    {before!r}
    + text
    + {after!r}
)
```

The tokenizer must {tokens}; one in a text or in the question would act as markup. In training a \
prompt had at most {max_prompt} tokens; the middle of a longer text was cut. An answer ends with \
one of the token ids {stop_ids}, or after {max_answer} tokens.
"""

EXPLANATION = """
## The explanation

```python
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

tokenizer = AutoTokenizer.from_pretrained(".")  # this folder
inputs = tokenizer(prompt, add_special_tokens={add_special_tokens}, return_tensors="pt")
{without_end}writer = AutoModelForCausalLM.from_pretrained(".", dtype=torch.float32)
ids = writer.generate(
    **inputs, max_new_tokens={max_answer}, do_sample=False, eos_token_id={stop_ids})
explanation = tokenizer.decode(ids[0, inputs["input_ids"].shape[1] :], skip_special_tokens=True)
```
"""

WITHOUT_END = """\
# it appends {end_tokens}, but no prompt ends there
inputs = {{name: ids[:, :-{end_tokens}] for name, ids in inputs.items()}}
"""

PROBABILITY = """
## The probability

```python
from safetensors.torch import load_file
from transformers import AutoModelForSequenceClassification

classifier = AutoModelForSequenceClassification.from_pretrained(
    ".", num_labels=1, dtype=torch.float32)  # warns that score.weight is missing
classifier.load_state_dict(load_file("score.safetensors"), strict=False)  # here it is
z = classifier(**inputs).logits[0, 0]
probability = torch.sigmoid(z / {temperature!r} + {bias!r}).item()  # of {yes!r}
decision = probability >= {threshold!r}
```
"""


OTHER_PROBABILITY = """
## The probability

transformers cannot compute it; `load_run` of CLSGen opens this folder and does.
"""


def merged_readme(run, has_plain_head):
    """For a merged folder. has_plain_head: z is the head's score of the last prompt token."""
    text = top(run, "Its LoRA adapter is merged into the weights.")
    rendered = run.prompts.rendered()
    without_end = ""
    if rendered["end_tokens"] > 0:
        without_end = WITHOUT_END.format(**rendered)
    text += EXPLANATION.format(
        max_answer=run.prompts.max_answer, without_end=without_end, **rendered)
    if not has_plain_head:
        return text + OTHER_PROBABILITY
    return text + PROBABILITY.format(
        temperature=run.fitted.temperature,
        bias=run.fitted.bias,
        threshold=run.fitted.threshold,
        yes=run.prompts.word(1),
    )


def adapter_readme(run):
    """For a folder with LoRA alone."""
    return top(run, "This is its LoRA adapter, which writes the explanation; the score head that "
                    "gives the probability is not in it.")


def as_words(text):
    """A text as one line of Markdown that is nothing but words: its marks are escaped."""
    line = printable(" ".join(text.split()))
    return re.sub(r"([\\`*_{}\[\]<>#!|~&])", r"\\\1", line)


def top(run, what):
    prompts = run.prompts
    rendered = prompts.rendered()
    tokens = "add no special tokens"
    if rendered["add_special_tokens"]:
        tokens = "add the special tokens that it adds by default"
    if rendered["end_tokens"] > 0:
        tokens += f", but not the last {rendered['end_tokens']}"
    return TOP.format(
        title=as_words(prompts.question),
        base=as_words(run.about["base"]),
        what=what,
        before=rendered["before_text"],
        after=rendered["after_text"],
        tokens=tokens,
        max_prompt=prompts.max_prompt,
        max_answer=prompts.max_answer,
        stop_ids=rendered["stop_ids"],
    )
