"""On a GPU: the same numbers as on a CPU, the kernels that were meant, and no needless waiting.

All of it skips where PyTorch finds no GPU.
"""

import signal
import warnings
from contextlib import contextmanager

import pytest
import torch
from conftest import make, make_run, write_model, write_tokenizer
from torch.profiler import ProfilerActivity, profile

import eval as evaluation
import predict
import train
from attention import attend
from clsgen import CLSGen, Reading, add_lora
from model import Llama
from plumbing.checkpoint import read_config
from run import load_run

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="PyTorch finds no GPU")


def prompts(device):
    """Three prompts of different lengths: ids padded on the right, and the last place of each."""
    ids = torch.arange(3 * 50).view(3, 50) % 390
    return ids.to(device), torch.tensor([49, 20, 33], device=device)


@pytest.mark.parametrize("changes", [{}, {"model_type": "mistral", "sliding_window": 16}])
def test_predictions_equal_those_of_a_cpu(tmp_path, changes):
    """Fails if a prompt, a cached token or a window sees other keys on a GPU than on a CPU."""
    write_model(tmp_path, **changes)
    found = {}
    for device in ("cpu", "cuda"):
        model = make(tmp_path).to(device)
        reading = Reading(model, *prompts(device), room=12)
        p = reading.log_probability([5, 6, 7])
        texts = torch.stack(list(reading.write([2], 12)), dim=1)
        found[device] = (reading.z().cpu(), p.cpu(), texts.cpu())
    for on_cpu, on_gpu in zip(found["cpu"], found["cuda"], strict=True):
        torch.testing.assert_close(on_gpu, on_cpu, atol=1e-4, rtol=1e-4)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_attention_without_a_mask_is_fused(dtype):
    """Fails if plain causal attention falls back to PyTorch's math kernel, which writes T x T, or
    takes cuDNN's."""
    q = torch.randn(2, 6, 300, 64, device="cuda", dtype=dtype, requires_grad=True)
    k = torch.randn(2, 2, 300, 64, device="cuda", dtype=dtype, requires_grad=True)
    v = torch.randn(2, 2, 300, 64, device="cuda", dtype=dtype, requires_grad=True)
    with profile(activities=[ProfilerActivity.CPU]) as found:
        y = attend(q, k, v, None)
        y.float().square().sum().backward()
    names = " ".join(event.name for event in found.events())
    kernel = "efficient"
    if dtype == torch.bfloat16 and torch.cuda.get_device_capability() >= (8, 0):
        kernel = "flash"
    assert f"_{kernel}_attention" in names and f"_{kernel}_attention_backward" in names, names
    assert "_attention_math" not in names and "cudnn_attention" not in names, names
    assert all(x.grad.isfinite().all() for x in (q, k, v))

    mask = torch.full((300, 300), -torch.inf).triu(1).cuda()[None, None]
    expected = attend(q.float(), k.float(), v.float(), mask)
    torch.testing.assert_close(y.float(), expected, atol=2e-2, rtol=2e-2)


def test_a_token_waits_for_the_gpu_once(tmp_path):
    """Fails if writing asks the GPU for more than whether all rows have stopped."""
    write_model(tmp_path)
    model = make(tmp_path).cuda()
    ids, ends = prompts("cuda")
    reading = Reading(model, ids, ends, room=12)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        torch.cuda.set_sync_debug_mode("warn")
        for _ in reading.write([399], 10):
            pass
        torch.cuda.set_sync_debug_mode("default")
    waits = [one for one in caught if "synchroniz" in str(one.message)]
    assert len(waits) <= 12, [str(one.message) for one in waits]  # 10 tokens and the set-up


@contextmanager
def stopped_at_once():
    """In place of stop_signals: a Ctrl-C has come already."""
    yield [signal.SIGINT]


@pytest.mark.parametrize("more", ["", " --checkpointing --dtype bfloat16"])
def test_train_resume_predict_and_eval(tiny, rows_file, tmp_path, monkeypatch, more):
    """Fails if a script leaves a tensor on the wrong device, or if a run of the GPU is refused."""
    out = tmp_path / "run"
    flags = f"--data {rows_file} --model {tiny} --out {out} --epochs 6 --batch 8 --rank 4"
    flags += " --valid-fraction 0.3 --lr 0.02 --max-answer 40" + more
    with monkeypatch.context() as patch:
        patch.setattr("train.stop_signals", stopped_at_once)
        with pytest.raises(SystemExit):
            train.main(flags.split())
    train.main(["--resume", str(out)])
    predict.main(f"--run {out} --data {rows_file} --out {tmp_path / 'p.jsonl'}".split())
    evaluation.main(f"--run {out} --model {tiny} --data {rows_file} --draws 20".split())
    assert load_run(out).device.type == "cuda"


def test_a_run_of_a_cpu_is_accepted(tiny, tmp_path):
    """Fails if the golden row of another device is refused."""
    write_tokenizer(tmp_path)
    make_run(tiny, tmp_path / "run")
    load_run(tmp_path / "run", device="cuda")


def test_training_attends_without_a_mask():
    """Fails if a training step on a GPU builds a T x T mask."""
    with torch.device("cuda"):
        config = read_config({
            "model_type": "llama", "vocab_size": 100, "hidden_size": 64, "intermediate_size": 64,
            "num_hidden_layers": 1, "num_attention_heads": 4, "num_key_value_heads": 2,
            "max_position_embeddings": 8192, "rms_norm_eps": 1e-5})
        llama = Llama(config).bfloat16()
    model = CLSGen(add_lora(llama, 4, 8.0))
    ids = torch.zeros(1, 8192, dtype=torch.long, device="cuda")
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    model.model(ids).sum().backward()
    used = torch.cuda.max_memory_allocated() - before
    assert used < 8192 * 8192 * 2, used  # one mask in bfloat16
