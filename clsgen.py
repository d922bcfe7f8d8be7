"""CLSGen (arXiv 2604.11801): a probability and a written explanation from one language model.

A row is a prompt (question and text) and, in training, an answer ("Yes. Because ..."). One forward
pass over both gives the hidden states h, and two heads read them:

      prompt tokens (question + text)          | answer tokens: "Yes. Because ..."
      ----------------------------------- x_P  | a_1  a_2 ... a_A
                     Llama + LoRA (one forward pass)
                                  h_P          | h_P  h_1 ... h_{A-1}
                                   |                   |
                       score head: D -> 1         lm_head: D -> V
                          logit z                p(a_t | x, a_<t)

      L = w_cls * mean over examples BCE(z, y)  +  w_lm * mean over answer tokens CE

The score head reads the last prompt token and nothing else. Attention is causal, so h_P cannot know
the answer: the probability sigmoid(z) is the same whatever is written after it.

The baselines are the same loss with one weight at zero: w_lm = 0 is a plain classifier, w_cls = 0
is plain generative fine-tuning.

Notation: B rows, T tokens, D hidden size, V vocabulary, A answer tokens of the whole batch.
"""

import math
from contextlib import contextmanager

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import skip_init


# --- two heads on one model -----------------------------------------------------------------------
class CLSGen(nn.Module):
    """A Llama whose lm_head writes the explanation, and a score head that gives the probability."""

    def __init__(self, llama):
        super().__init__()
        self.model = llama  # this name and the next are Hugging Face's, and so the files have them
        weight = llama.norm.weight
        self.score = nn.Linear(len(weight), 1, bias=False, device=weight.device)  # float32

    def read_out(self, hidden, prompt_end):
        """The logit z of each row, (B,): the score head on the state of its last prompt token.

        Training, prediction and the check of a run folder all come here, and nowhere else.
        hidden (B, T, D); prompt_end (B,), the index of each row's last prompt token.
        """
        rows = torch.arange(len(hidden), device=hidden.device)
        h_P = hidden[rows, prompt_end]  # (B, D)
        return self.score(h_P.float()).squeeze(-1)

    def forward(self, batch):
        """One pass for both heads: z (B,) and the logits of the answer tokens (A, V).

        `batch` has input_ids (B, T), prompt_end (B,), and for each answer token the row and the
        position of the hidden state that predicts it: answer_rows and answer_positions (A,).
        """
        hidden = self.model(batch.input_ids)  # (B, T, D)
        z = self.read_out(hidden, batch.prompt_end)

        # lm_head is the widest product of all, so it runs only where an answer token is predicted
        before_answers = hidden[batch.answer_rows, batch.answer_positions]  # (A, D)
        return z, self.model.logits(before_answers)

    @torch.no_grad()
    def start_head(self, label_ids):
        """Starts the score head at the label words, so that z is the model's own log-odds.

        It becomes lm_head's row for "Yes" minus its row for "No". Both losses then move a hidden
        state along one line from the first step on; the idea is that of LM-BFF (arXiv 2012.15723).

        label_ids: the token ids of "No." and of "Yes.". The first tokens that differ are taken; if
        none differ, the head starts at zero.
        """
        rows = self.model.output_weight()  # (V, D)
        self.score.weight.zero_()
        no_ids, yes_ids = label_ids
        for no, yes in zip(no_ids, yes_ids, strict=False):
            if no != yes:
                self.score.weight.copy_(rows[yes].float() - rows[no].float())
                return

    def parameter_groups(self):
        """Each parameter once, by its part in training: {"lora" | "head" | "frozen": {name: it}}.

        Training, saving and loading all ask here.
        """
        groups = {"lora": {}, "head": {}, "frozen": {}}
        for name, parameter in self.named_parameters():
            if ".lora_" in name:
                kind = "lora"
            elif name.startswith("score."):
                kind = "head"
            else:
                kind = "frozen"
            groups[kind][name] = parameter
        return groups


# --- the joint loss -------------------------------------------------------------------------------
def joint_loss(z, y, logits, targets, n_examples, n_tokens):
    """The terms of the loss, by name: {"bce": ..., "lm": ...}. A new term is one more entry.

    z, y (B,); logits (A, V); targets (A,). A row without an explanation has no answer tokens: it is
    in the first term and not in the second.

    The sums of a micro-batch are divided by the counts of the whole optimizer step, n_examples and
    n_tokens. So micro-batches add up to the gradient of one large batch, and short answers weigh no
    more than long ones, which a mean over micro-batch means would do.

    ValueError for a label that is not 0 or 1, which binary cross-entropy would silently accept.
    """
    if not ((y == 0) | (y == 1)).all():
        raise ValueError(f"labels are {y.tolist()}, expected 0 or 1 for binary cross-entropy")

    bce = F.binary_cross_entropy_with_logits(z, y, reduction="sum")
    cross_entropy = F.cross_entropy(logits.float(), targets, reduction="sum")
    return {
        "bce": bce / n_examples,
        "lm": cross_entropy / max(n_tokens, 1),  # a step without any answer token has none
    }


def total_loss(terms, weights):
    """L, the weighted sum of the terms. A term that `weights` does not name has weight 1.

    A term of weight 0 stays in the sum, so that every trained parameter gets a gradient, if only a
    zero one, in each micro-batch: DistributedDataParallel waits for them all.
    """
    total = 0.0
    for name, term in terms.items():
        total = total + weights.get(name, 1.0) * term
    return total


# --- LoRA -----------------------------------------------------------------------------------------
TARGETS = ("q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj")


class LoRALinear(nn.Module):
    """A frozen linear layer plus a trained product of two thin matrices (arXiv 2106.09685).

        y = base(x) + (alpha / rank) x A^T B^T,   A (rank, in), B (out, rank)

    A starts at random and B at zero, so that wrapping a layer changes nothing at first. Both are
    float32, since small updates vanish in bfloat16; their products run in the dtype of x.
    """

    def __init__(self, base, rank, alpha):
        super().__init__()
        self.base = base
        self.scale = alpha / rank
        self.lora_on = True  # see `base_model`

        device = base.weight.device
        self.lora_A = skip_init(nn.Linear, base.in_features, rank, bias=False, device=device)
        self.lora_B = skip_init(nn.Linear, rank, base.out_features, bias=False, device=device)
        nn.init.kaiming_uniform_(self.lora_A.weight, a=math.sqrt(5))  # as peft: U(+-1/sqrt(in))
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        y = self.base(x)
        if not self.lora_on:
            return y
        A = self.lora_A.weight.to(x.dtype)
        B = self.lora_B.weight.to(x.dtype)
        low_rank = self.scale * F.linear(x, A)  # (..., rank)
        return y.add_(F.linear(low_rank, B))  # in place: a second tensor of y's size is spared


def add_lora(llama, rank, alpha, targets=TARGETS):
    """Freezes llama and puts a LoRALinear in place of the named projections of every block.

    ValueError for a rank that is not from 1 to the hidden size, or a target that is unknown.
    """
    hidden_size = llama.config.hidden_size
    if type(rank) is not int or not 0 < rank <= hidden_size:
        raise ValueError(f"LoRA's rank is {rank}, expected 1 to {hidden_size}, the hidden size")
    unknown = sorted(set(targets) - set(TARGETS))
    if unknown:
        raise ValueError(f"LoRA's targets are {unknown}, expected some of {', '.join(TARGETS)}")

    llama.requires_grad_(False)
    for block in llama.layers:
        for part in (block.self_attn, block.mlp):
            for name, layer in list(part.named_children()):
                if name in targets:
                    setattr(part, name, LoRALinear(layer, rank, alpha))
    return llama


@contextmanager
def base_model(model):
    """Inside this block the model computes as before training: its LoRA is switched off."""
    adapted = [module for module in model.modules() if hasattr(module, "lora_on")]
    for module in adapted:
        module.lora_on = False
    try:
        yield
    finally:
        for module in adapted:
            module.lora_on = True


# --- prediction: a prompt is read once ------------------------------------------------------------
def choose_token(logits, temperature=0.0, top_p=1.0, generator=None):
    """The next token of each row, (B, V) -> (B,): at temperature 0 the likeliest one.

    Else a draw from softmax(logits / temperature), among the fewest tokens that together have the
    probability top_p (nucleus sampling, arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits / temperature).softmax(-1)

    # All tokens below (1 - top_p) / V together weigh less than 1 - top_p, so that none of them is
    # drawn: only the others have to be sorted
    likely = p >= (1 - top_p) / p.shape[-1]
    p, ids = p.topk(int(likely.sum(-1).max()))  # (B, n), the likeliest first

    before = p.cumsum(-1) - p
    p[before > top_p] = 0  # the token that crosses top_p still counts
    drawn = torch.multinomial(p.cpu(), 1, generator=generator)
    return ids.gather(-1, drawn.to(ids.device)).squeeze(-1)


class Reading:
    """What is left of a batch of prompts after one pass: hidden states and the key/value cache.

    Everything else continues from here: z, the probability of a label's words, and the text. The
    prompt is never run a second time.
    """

    @torch.inference_mode()
    def __init__(self, model, input_ids, prompt_end, room):
        """input_ids (B, T), padded on the right; prompt_end (B,); room for that many new tokens."""
        n_rows, n_tokens = input_ids.shape
        self.model = model
        self.llama = model.model
        self.prompt_end = prompt_end
        self.cache = self.llama.new_cache(n_rows, n_tokens + room)
        self.hidden = self.llama(input_ids, self.cache)  # (B, T, D)

        rows = torch.arange(n_rows, device=input_ids.device)
        self.last = self.hidden[rows, prompt_end]  # (B, D), what the first new token follows from

    @torch.inference_mode()
    def z(self):
        """The score head's logit of each row, (B,)."""
        return self.model.read_out(self.hidden, self.prompt_end)

    @torch.inference_mode()
    def log_probability(self, ids):
        """log p(ids | prompt) of each row, (B,), for the token ids of one string such as "Yes."."""
        tokens = torch.tensor(ids, device=self.last.device).expand(len(self.last), -1)  # (B, n)
        hidden = self.last[:, None]  # (B, 1, D)
        if len(ids) > 1:
            steps = torch.arange(1, len(ids), device=tokens.device)
            positions = self.prompt_end[:, None] + steps
            more = self.llama(tokens[:, :-1], self.cache, positions)
            hidden = torch.cat((hidden, more), dim=1)  # (B, n, D)

        log_p = self.llama.logits(hidden).float().log_softmax(-1)  # (B, n, V)
        return log_p.gather(-1, tokens[..., None]).sum((1, 2))

    @torch.inference_mode()
    def write(self, stop_ids, max_tokens, choose=choose_token, openings=()):
        """Yields the next token of each row, (B,), until every row has written one of stop_ids.

        A row that has stopped goes on with stop_ids[0]. `openings`: token ids that each row's text
        has to begin with. choose(logits (B, V)) picks the others.
        """
        stop_ids = torch.tensor(stop_ids, device=self.last.device)
        stopped = torch.zeros(len(self.last), dtype=torch.bool, device=self.last.device)
        last = self.last

        for step in range(max_tokens):
            tokens = choose(self.llama.logits(last).float())
            for row, opening in enumerate(openings):
                if step < len(opening):
                    tokens[row] = opening[step]
            tokens[stopped] = stop_ids[0]
            yield tokens

            stopped |= torch.isin(tokens, stop_ids)
            if stopped.all():
                return
            positions = self.prompt_end[:, None] + 1 + step
            last = self.llama(tokens[:, None], self.cache, positions)[:, 0]
