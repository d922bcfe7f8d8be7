"""CLSGen (arXiv 2604.11801): a probability and a written explanation from one language model.

A row is a prompt (question and text) with a label y, 0 or 1. If the row has an explanation, it also
has an answer: the label's word, the explanation, and the end of turn ("Yes. Because ..."). One
forward pass over prompt and answer gives the hidden states h. Below each answer token stands the
state that predicts it, which is that of the token before. Two heads read the states:

      prompt tokens (question + text)       | answer tokens: "Yes. Because ..."
      x_1  x_2  ...                    x_P  | a_1  a_2     ...  a_n
                     Llama + LoRA (one forward pass)
                                       h_P  | h_P  h_{P+1} ...  h_{P+n-1}
                                        |                  |
                           score head: D -> 1        lm_head: D -> V
                               logit z               p(a_t | x, a_<t)

      L = w_cls * mean over examples BCE(z, y)  +  w_lm * mean over answer tokens CE

sigmoid(z) is the probability of label 1, "yes". The score head reads the last prompt token and
nothing else, and attention is causal: h_P cannot know the answer, so the probability is the same
whatever is written after it. A row without an answer is in the first mean and not in the second.

The baselines are the same loss with one weight at zero. w_lm = 0 is a plain classifier, whose
probability is sigmoid(z) too. w_cls = 0 is plain generative fine-tuning: its head is never trained,
and its probability is that of the words, p("Yes.") / (p("Yes.") + p("No.")).

What ties the text to the probability: h_P also predicts the first word of the answer, and with the
default start of the score head (`start_head`) z begins as that word's log-odds of "Yes" and "No".
Nothing in the loss makes the rest of the explanation agree with p.

From the paper come the two heads, the joint loss, and explanations written by a teacher model
(explain.py). Which position its head reads, and its loss weights, were not found: these and the
start of the head are our own choices (docs/choices.md).

Notation: B rows, T tokens, D hidden size, V vocabulary; P prompt tokens and n answer tokens of one
row; A answer tokens of the whole batch.
"""

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
        # `model` and `score` are Hugging Face's names, so saved parameters have the same keys
        self.model = llama
        hidden_size = llama.config.hidden_size
        device = llama.norm.weight.device
        self.score = nn.Linear(hidden_size, 1, bias=False, device=device)  # float32 on any base

    def read_out(self, hidden, prompt_end):
        """The logit z of each row, (B,): the score head on the state of its last prompt token.

        hidden (B, T, D); prompt_end (B,), the index of each row's last prompt token. This is the
        only place that makes z: training, prediction and the check of a saved run call it. Another
        read-out changes this method alone, and `start_head` if it calls for another start. What it
        needs to learn for that is an attribute of CLSGen, which trains and is saved with the head.
        """
        h_P = states_at(hidden, prompt_end)  # (B, D)
        return self.score(h_P.float()).squeeze(-1)

    def forward(self, batch):
        """One pass for both heads: z (B,) and the logits of the answer tokens (A, V).

        batch: a data.Batch of rows that are padded on the right. Its prompt_end is the length of
        each prompt minus 1. Answer token i belongs to row answer_rows[i], and the state that
        predicts it is the one before it, at answer_positions[i].
        """
        hidden = self.model(batch.input_ids)  # (B, T, D)
        z = self.read_out(hidden, batch.prompt_end)

        # lm_head is the widest product of all, so it runs only where an answer token is predicted
        before_answers = hidden[batch.answer_rows, batch.answer_positions]  # (A, D)
        return z, self.model.logits(before_answers)

    @torch.no_grad()
    def start_head(self, label_ids):
        """Starts the score head as lm_head's row for "Yes" minus its row for "No".

        z is then the model's own log-odds of these two tokens, and both losses push h_P in the
        same direction from the first step on (as in LM-BFF, arXiv 2012.15723). A start at zero
        would give LoRA no gradient from the BCE in the first step.

        label_ids: the token ids of "No." and of "Yes.". If they begin with the same tokens, the
        rows are those of the first two that differ. h_P does not predict these, so z is then not
        the words' log-odds, only a start in a useful direction.
        """
        _, no, yes = first_difference(label_ids)
        no_row, yes_row = self.model.output_rows([no, yes])  # (D,) each
        self.score.weight.copy_(yes_row - no_row)

    def start_head_at_random(self):
        """Starts the score head from N(0, 0.02^2), as Hugging Face's classification heads do.

        It then knows nothing of the label words, and its first gradients push h_P in a random
        direction.
        """
        nn.init.normal_(self.score.weight, std=0.02)

    def parameters_by_part(self):
        """All parameters by their part in training, {part: {name: parameter}}.

        The parts are "lora" and "head", which are trained and saved, and "frozen".
        """
        parts = {"lora": {}, "head": {}, "frozen": {}}
        for name, parameter in self.named_parameters():
            if ".lora_" in name:
                part = "lora"
            elif name.startswith("model."):
                part = "frozen"
            else:  # what CLSGen itself has: the score head, and what another read-out needs
                part = "head"
            parts[part][name] = parameter
        return parts


def first_difference(label_ids):
    """(place, no, yes): where the token ids of "No." and "Yes." first differ, and by which ids.

    Most words differ in their first token: place is 0.
    """
    pairs = zip(*label_ids, strict=False)
    for place, (no, yes) in enumerate(pairs):
        if no != yes:
            return place, no, yes
    raise ValueError("the label words begin with the same tokens, up to the end of one of them; "
                     "choose others with --labels")


def states_at(hidden, positions):
    """The hidden state of each row at its own position: (B, T, D) and (B,) -> (B, D)."""
    rows = torch.arange(len(hidden), device=hidden.device)
    return hidden[rows, positions]


# --- the joint loss -------------------------------------------------------------------------------
def joint_loss(z, y, logits, targets, n_examples, n_tokens):
    """The terms of the loss by name, {"bce": ..., "lm": ...}. A new term is one more entry.

    z, y (B,) of a micro-batch; logits (A, V) and targets (A,) of its answer tokens.

    n_examples and n_tokens are the two denominators: the examples and the answer tokens of the
    whole optimizer step, all its micro-batches on all GPUs. So micro-batches add up to the gradient
    of one large batch, and every answer token weighs the same. (A mean of micro-batch means would
    overweight the tokens of a micro-batch with short answers. The mean that PyTorch takes over GPUs
    is undone in train.py.)

    ValueError for a label that is not 0 or 1, which PyTorch's function would silently accept.
    """
    if not ((y == 0) | (y == 1)).all():
        raise ValueError(f"labels are {y.tolist()}, expected 0 or 1 for binary cross-entropy")

    bce = F.binary_cross_entropy_with_logits(z, y, reduction="sum")
    cross_entropy = F.cross_entropy(logits.float(), targets, reduction="sum")
    return {
        "bce": bce / n_examples,
        "lm": cross_entropy / max(n_tokens, 1),  # without answer tokens it is 0 / 1, and not 0 / 0
    }


def label_loss(logits, batch, label_ids, over, n_answers):
    """One more term for plain generative fine-tuning: the label's token, as a mean over answers.

    In the LM loss this token is one of n; here it weighs as much as the BCE does. That is the
    comparison that asks what the score head adds.

    logits (A, V) of the batch's answer tokens. over: "vocabulary", the cross-entropy over all V
    tokens, or "words", over the two label words only. n_answers: of the whole step.
    """
    place, no, yes = first_difference(label_ids)
    label_positions = batch.prompt_end[batch.answer_rows] + place  # (A,)
    is_label = batch.answer_positions == label_positions
    logits = logits[is_label].float()  # (rows of the batch that have an answer, V)
    targets = batch.targets[is_label]
    if over == "words":
        logits = logits[:, [no, yes]]
        targets = (targets == yes).long()
    return F.cross_entropy(logits, targets, reduction="sum") / max(n_answers, 1)


def total_loss(terms, weights):
    """L, the weighted sum of the terms. weights: {"bce": w_cls, "lm": w_lm}.

    A term that `weights` does not name has weight 1.

    A term of weight 0 stays in the sum. So the score head gets a gradient, of zeros, even when
    w_cls = 0: DistributedDataParallel waits for one for each trainable parameter.
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

        # A keeps nn.Linear's own start, U(+-1/sqrt(in)), as in peft; B skips it and is set to zero
        device = base.weight.device
        self.lora_A = nn.Linear(base.in_features, rank, bias=False, device=device)
        self.lora_B = skip_init(nn.Linear, rank, base.out_features, bias=False, device=device)
        nn.init.zeros_(self.lora_B.weight)

    def forward(self, x):
        y = self.base(x)
        if not self.lora_on:
            return y
        down = self.lora_A.weight.to(x.dtype)
        up = self.lora_B.weight.to(x.dtype)
        low_rank = self.scale * F.linear(x, down)  # (..., rank)
        return y.add_(F.linear(low_rank, up))  # in place to save memory: no gradient needs y itself


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
    """Inside `with base_model(model):` the model's LoRA is off, so that the base can be compared.

    The head stays as it is.
    """
    # LoRALinear, or the packed projections that replace it for predictions (plumbing/packed.py)
    adapted = [module for module in model.modules() if hasattr(module, "lora_on")]
    for module in adapted:
        module.lora_on = False
    try:
        yield
    finally:
        for module in adapted:
            module.lora_on = True


# --- prediction: a prompt is read once ------------------------------------------------------------
class Reading:
    """What one pass over a batch of prompts leaves: hidden states and a key/value cache.

    Everything else follows from them: z, the probability of a label's words, and the text. The
    prompt is never run a second time.
    """

    @torch.inference_mode()
    def __init__(self, model, input_ids, prompt_end, room):
        """model: a CLSGen. input_ids (B, T) are prompts, padded on the right; prompt_end (B,).

        room: the most tokens that may follow a prompt; the cache has places for them.
        """
        n_rows, self.n_tokens = input_ids.shape
        self.model = model
        self.llama = model.model
        self.prompt_end = prompt_end
        # Without positions, a call reads whole prompts and fills the cache. A later call brings the
        # tokens that follow, with their positions, and sees the keys up to these
        self.cache = self.llama.new_cache(n_rows, self.n_tokens + room)
        self.hidden = self.llama(input_ids, self.cache)  # (B, T, D)
        self.h_P = states_at(self.hidden, prompt_end)  # (B, D), which predicts the next token

    @torch.inference_mode()
    def z(self):
        """The score head's logit of each row, (B,)."""
        return self.model.read_out(self.hidden, self.prompt_end)

    @torch.inference_mode()
    def log_probability(self, ids):
        """log p(ids | prompt) of each row, (B,), for the token ids of one string such as "Yes.".

        The first of them is predicted by h_P, and each other one by the token before it. What this
        leaves in the cache does no harm: the next call, of this or of `write`, overwrites each
        place before a token may see it.
        """
        tokens = torch.tensor(ids, device=self.h_P.device).expand(len(self.h_P), -1)  # (B, n)
        hidden = self.h_P[:, None]  # (B, 1, D)
        if len(ids) > 1:
            # The last token is not run: what it predicts is not asked for
            steps = torch.arange(1, len(ids), device=tokens.device)
            positions = self.prompt_end[:, None] + steps
            more = self.llama(tokens[:, :-1], self.cache_for(len(ids) - 1), positions)
            hidden = torch.cat((hidden, more), dim=1)  # (B, n, D)

        log_p = self.llama.logits(hidden).float().log_softmax(-1)  # (B, n, V)
        return log_p.gather(-1, tokens[..., None]).sum((1, 2))

    @torch.inference_mode()
    def write(self, stop_ids, max_tokens, choose=None, openings=()):
        """Yields the next token of each row, (B,), until every row has written one of stop_ids.

        It ends after max_tokens at the latest. A row that has stopped gets stop_ids[0] from then
        on. choose(logits (B, V)) picks the tokens, by default the likeliest. openings: for each row
        the token ids that its text has to begin with; without them the model chooses every token.
        """
        if choose is None:
            choose = choose_token
        stop_ids = torch.tensor(stop_ids, device=self.h_P.device)
        stopped = torch.zeros(len(self.h_P), dtype=torch.bool, device=self.h_P.device)
        last = self.h_P

        for n_written in range(max_tokens):
            tokens = choose(self.llama.logits(last).float())
            for row, opening in enumerate(openings):
                if n_written < len(opening):
                    tokens[row] = opening[n_written]
            tokens = torch.where(stopped, stop_ids[0], tokens)
            yield tokens

            stopped |= torch.isin(tokens, stop_ids)
            # With the likeliest tokens, this is where a GPU is waited for, and nowhere else
            if stopped.all() or n_written + 1 == max_tokens:
                return
            # Each row's own positions: a new key overwrites a pad, and the mask hides later ones
            positions = self.prompt_end[:, None] + 1 + n_written
            last = self.llama(tokens[:, None], self.cache_for(n_written + 1), positions)[:, 0]

    def cache_for(self, n_new):
        """The part of the cache that holds the prompts and up to n_new tokens after each."""
        return self.cache[..., : self.n_tokens + n_new, :]


def choose_token(logits, temperature=0.0, top_p=1.0, generator=None):
    """The next token of each row, (B, V) -> (B,): at temperature 0 the likeliest one.

    Otherwise a draw from softmax(logits / temperature), among the fewest tokens that together have
    the probability top_p (nucleus sampling, arXiv 1904.09751).
    """
    if temperature == 0:
        return logits.argmax(-1)
    p = (logits / temperature).softmax(-1)

    # Only likely tokens are sorted. Those that are less likely than (1 - top_p) / V have less than
    # 1 - top_p together, so the others have more than top_p, and are enough
    likely = p >= (1 - top_p) / p.shape[-1]
    p, ids = p.topk(int(likely.sum(-1).max()))  # (B, n), the likeliest first

    if top_p < 1:
        before = p.cumsum(-1) - p
        p[before >= top_p] = 0  # those before it have top_p already
    drawn = torch.multinomial(p.cpu(), 1, generator=generator)  # on the CPU, as the generator is
    return ids.gather(-1, drawn.to(ids.device)).squeeze(-1)


if __name__ == "__main__":
    raise SystemExit("clsgen.py is the method, not a command: see train.py, predict.py, export.py")
