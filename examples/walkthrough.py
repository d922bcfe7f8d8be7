"""This script shows the method step by step, on one row and a real model.

    python examples/smollm2.py        # once: the model
    python examples/walkthrough.py    # under a minute

Run it as a whole, or cell by cell in an editor that knows # %%. Each cell prints what it claims.
The code that it calls is in clsgen.py, which is to be read next. Notation, as there: p = sigmoid(z)
is the probability of label 1; T tokens, D hidden size, V vocabulary, A answer tokens.
"""

# %% A row and a real model
import sys
from pathlib import Path

import torch

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from clsgen import CLSGen, Reading, add_lora, base_model, joint_loss, total_loss  # noqa: E402
from data import collate, encode_rows, show  # noqa: E402
from plumbing.checkpoint import load_llama  # noqa: E402
from prompts import Prompts  # noqa: E402

MODEL = ROOT / "models" / "smollm2-135m"
torch.manual_seed(0)
llama = load_llama(MODEL, torch.float32)
prompts = Prompts(MODEL, question="Will the patient die within 30 days?")
row = {
    "id": "example",
    "text": "The patient, 81 years old, came with sepsis. There is a history of heart failure.",
    "label": 1,
    "explanation": "Sepsis and heart failure at this age make death likely.",
}


def title(text):
    print(f"\n=== {text}")


# %% 1. A row becomes tokens
title("1. A row becomes tokens: a prompt, and the answer that is learned")
(example,) = encode_rows([row], prompts)
print(show(example, prompts))

# %% 2. Where the score head reads
title("2. The score head reads one hidden state: that of the last prompt token")
batch = collate([example])
n_answer_tokens = len(batch.targets)
prompt_end = batch.prompt_end.item()
first_answer_position = batch.answer_positions[0].item()  # where its first token is predicted
last_prompt_token = prompts.tokenizer.decode(example.prompt[-1:])
print(f"the row has {len(example)} tokens, {len(example.prompt)} of them the prompt")
print(f"the score head reads position {prompt_end}, counted from 0: the token "
      f"{last_prompt_token!r}")
print(f"lm_head predicts {n_answer_tokens} answer tokens, the first one from the same position "
      f"{first_answer_position}")
assert prompt_end == first_answer_position == len(example.prompt) - 1

# %% 3. LoRA changes nothing at first
title("3. LoRA is wrapped around the model and changes nothing at first")
with torch.no_grad():
    before = llama(batch.input_ids)  # (1, T, D)
    add_lora(llama, rank=16, alpha=32.0)  # in place: from here on llama is the adapted model
    after = llama(batch.input_ids)
largest_change = (after - before).abs().max().item()
print(f"largest change of a hidden state: {largest_change}")
assert torch.equal(before, after)

# The score head is added, and starts as lm_head's row for "Yes" minus its row for "No"
model = CLSGen(llama)
model.start_head(prompts.label_ids)

parts = model.parameters_by_part()  # LoRA and head are trained
for part, parameters in parts.items():
    count = sum(parameter.numel() for parameter in parameters.values())
    print(f"{part:7} {count:>12,} parameters")

# %% 4. The two losses of one row
title("4. The two losses of one row, once by hand and once by joint_loss")
with torch.no_grad():
    z, logits = model(batch)  # (1,), (A, V)
    terms = joint_loss(
        z, batch.labels, logits, batch.targets, n_examples=1, n_tokens=n_answer_tokens)

    # by hand
    p = torch.sigmoid(z)
    bce = -p.log()[0]  # since the label is 1
    log_p_answer = logits.log_softmax(-1)[torch.arange(n_answer_tokens), batch.targets]  # (A,)
    lm = -log_p_answer.mean()

print(f"z = {z.item():+.3f}, p = {p.item():.3f}")
print(f"BCE: -log p                       = {bce:.4f}   joint_loss: {terms['bce']:.4f}")
print(f"LM:  mean of -log p(answer token) = {lm:.4f}   joint_loss: {terms['lm']:.4f}")
torch.testing.assert_close(terms["bce"], bce)
torch.testing.assert_close(terms["lm"], lm)

label_only_row = {"id": "label only", "text": row["text"], "label": 1}
(label_only,) = encode_rows([label_only_row], prompts)
print(f"a row without an explanation has {len(label_only.answer)} answer tokens: it trains the "
      "score head, and the LM loss never sees it")
assert label_only.answer == []

# %% 5. p cannot depend on the answer
title("5. Another answer leaves z alone; a head on the row's last token would see the answer")
other_row = dict(row, label=0, explanation="Good care at this age makes death unlikely.")
(other_example,) = encode_rows([other_row], prompts)

z_prompt_end = []
z_last_token = []  # the same head where other tools read: at the end of the answer
for variant in (example, other_example):
    last_token = torch.tensor([len(variant) - 1])
    with torch.no_grad():
        hidden = model.model(collate([variant]).input_ids)  # (1, T, D)
        z_prompt_end.append(model.read_out(hidden, batch.prompt_end).item())
        z_last_token.append(model.read_out(hidden, last_token).item())
    print(f"z at the prompt's end {z_prompt_end[-1]:+.4f}, at the row's last token "
          f"{z_last_token[-1]:+.4f}, with the answer {prompts.decode(variant.answer)!r}")
assert abs(z_prompt_end[0] - z_prompt_end[1]) < 1e-4
assert abs(z_last_token[0] - z_last_token[1]) > 1e-2

# %% 6. Optimizer steps lower both losses
title("6. Optimizer steps on this row lower both losses, through the same LoRA")
trained = [*parts["lora"].values(), *parts["head"].values()]
optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)

history = []
for step in range(4):
    z, logits = model(batch)
    terms = joint_loss(z, batch.labels, logits, batch.targets, 1, n_answer_tokens)
    history.append({name: term.item() for name, term in terms.items()})
    print(f"step {step}: BCE {terms['bce']:.4f}, LM loss {terms['lm']:.4f}")

    loss = total_loss(terms, weights={"bce": 1.0, "lm": 1.0})
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
assert history[-1]["bce"] < history[0]["bce"]
assert history[-1]["lm"] < history[0]["lm"]

# %% 7. One reading gives p and the text
title("7. The prompt is read once; p, the label words and the text come from that reading")
prompt_ids = torch.tensor([example.prompt])  # (1, T)
reading = Reading(model, prompt_ids, batch.prompt_end, room=24)
no_ids, yes_ids = prompts.label_ids  # of "No." and "Yes."
log_odds = reading.log_probability(yes_ids) - reading.log_probability(no_ids)
print(f"p of the score head {torch.sigmoid(reading.z()).item():.3f}, of the words Yes. and No. "
      f"{torch.sigmoid(log_odds).item():.3f}")

written = [token.item() for token in reading.write(prompts.stop_ids, max_tokens=24)]
print(f"text: {prompts.decode(written)}")

with base_model(model):  # LoRA switched off, for comparison
    base_reading = Reading(model, prompt_ids, batch.prompt_end, room=24)
    written = [token.item() for token in base_reading.write(prompts.stop_ids, max_tokens=24)]
print(f"the base model's text: {prompts.decode(written)}")
