"""The method in one sitting: run it as a whole, or cell by cell in an editor that knows # %%.

    python examples/smollm2.py        # once: the model
    python examples/walkthrough.py    # under a minute

Each cell prints what it claims. The code that it calls is clsgen.py, which is to be read next.
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
end = batch.prompt_end.item()
print(f"the row has {len(example)} tokens, {len(example.prompt)} of them the prompt")
print(f"the head reads position {end}, the token {prompts.tokenizer.decode(example.prompt[-1:])!r}")
print(f"lm_head predicts {len(batch.targets)} answer tokens, the first from the same position "
      f"{batch.answer_positions[0].item()}")
assert batch.answer_positions[0] == end == len(example.prompt) - 1

# %% 3. LoRA changes nothing at first
title("3. LoRA is wrapped around the model and changes nothing at first")
with torch.no_grad():
    before = llama(batch.input_ids)
    model = CLSGen(add_lora(llama, rank=16, alpha=32.0))
    after = llama(batch.input_ids)
print(f"largest change of a hidden state: {(after - before).abs().max().item()}")
assert torch.equal(before, after)

parts = model.parameters_by_part()
for kind, parameters in parts.items():
    print(f"{kind:7} {sum(p.numel() for p in parameters.values()):>12,} parameters")

# The head starts as lm_head's row for "Yes" minus its row for "No"
model.start_head(prompts.label_ids)

# %% 4. The two losses of one row
title("4. The two losses of one row, once by hand and once by joint_loss")
with torch.no_grad():
    z, logits = model(batch)
    terms = joint_loss(z, batch.labels, logits, batch.targets, n_examples=1,
                       n_tokens=len(batch.targets))

    p = torch.sigmoid(z)  # the label is 1, so the loss is -log p
    log_p = logits.log_softmax(-1)[torch.arange(len(batch.targets)), batch.targets]
print(f"z = {z.item():+.3f}, p = {p.item():.3f}")
print(f"BCE: -log p                       = {-p.log().item():.4f}   joint_loss: {terms['bce']:.4f}")
print(f"LM:  mean of -log p(answer token) = {-log_p.mean().item():.4f}   "
      f"joint_loss: {terms['lm']:.4f}")
torch.testing.assert_close(terms["bce"], -p.log()[0])
torch.testing.assert_close(terms["lm"], -log_p.mean())

(label_only,) = encode_rows([{"id": 2, "text": row["text"], "label": 1}], prompts)
print(f"a row without an explanation has {len(label_only.answer)} answer tokens: it trains the "
      "score head, and the LM loss never sees it")

# %% 5. p cannot depend on the answer
title("5. Another answer leaves z alone; a head on the row's last token would read the label")
other_row = dict(row, label=0, explanation="Good care at this age makes death unlikely.")
(other_example,) = encode_rows([other_row], prompts)
with torch.no_grad():
    readings = []
    for one in (example, other_example):
        one_batch = collate([one])
        hidden = model.model(one_batch.input_ids)
        z_prompt_end = model.read_out(hidden, one_batch.prompt_end).item()
        last_token = torch.tensor([len(one) - 1])  # what other tools read, the answer included
        z_last_token = model.read_out(hidden, last_token).item()
        readings.append((z_prompt_end, z_last_token))
        answer = prompts.decode(one.answer)
        print(f"z at the prompt's end {z_prompt_end:+.4f}, at the row's last token "
              f"{z_last_token:+.4f}, with the answer {answer!r}")
assert abs(readings[0][0] - readings[1][0]) < 1e-4
assert abs(readings[0][1] - readings[1][1]) > 1e-2

# %% 6. One step moves both
title("6. Optimizer steps on this row: both losses fall, through the same LoRA")
trained = [*parts["lora"].values(), *parts["head"].values()]
optimizer = torch.optim.AdamW(trained, lr=1e-3, weight_decay=0.0)
history = []
for step in range(4):
    z, logits = model(batch)
    terms = joint_loss(z, batch.labels, logits, batch.targets, 1, len(batch.targets))
    history.append({name: term.item() for name, term in terms.items()})
    print(f"step {step}: BCE {history[-1]['bce']:.4f}, LM loss {history[-1]['lm']:.4f}")

    loss = total_loss(terms, weights={"bce": 1.0, "lm": 1.0})
    loss.backward()
    optimizer.step()
    optimizer.zero_grad()
assert history[-1]["bce"] < history[0]["bce"]
assert history[-1]["lm"] < history[0]["lm"]

# %% 7. One reading gives p and the text
title("7. The prompt is read once; p, the label words and the text come from that reading")
prompt = torch.tensor([example.prompt])
prompt_end = torch.tensor([len(example.prompt) - 1])
reading = Reading(model, prompt, prompt_end, room=24)
no_ids, yes_ids = prompts.label_ids
odds = reading.log_probability(yes_ids) - reading.log_probability(no_ids)
tokens = [token.item() for token in reading.write(prompts.stop_ids, max_tokens=24)]
print(f"p of the score head {torch.sigmoid(reading.z()).item():.3f}, of the words Yes. and No. "
      f"{torch.sigmoid(odds).item():.3f}")
print(f"text: {prompts.decode(tokens)}")

with base_model(model):  # LoRA switched off, for comparison
    reading = Reading(model, prompt, prompt_end, room=24)
    tokens = [token.item() for token in reading.write(prompts.stop_ids, max_tokens=24)]
print(f"the base model's text: {prompts.decode(tokens)}")
