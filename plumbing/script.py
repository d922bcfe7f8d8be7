"""What every script does: one sentence for an error, signals, the device, versions."""

import argparse
import ctypes
import os
import resource
import signal
import sys
import unicodedata
from contextlib import contextmanager, suppress
from importlib.metadata import version

import torch


def run_main(main, when_stopped="stopped"):
    """Runs a script's main: what a user can put right is one sentence and exit code 2.

    A terminal gets characters that its encoding lacks as escapes. If nobody reads the output any
    more, as with `| head`, the script ends silently with the exit code of other tools, 141.
    when_stopped: what Ctrl-C makes it say.
    """
    keep_freed_memory()
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace")
    try:
        code = exit_code(main, when_stopped)
        sys.stdout.flush()  # now, while an error can still be caught
    except BrokenPipeError:
        code = 141
        nowhere = os.open(os.devnull, os.O_WRONLY)
        for stream in (sys.stdout, sys.stderr):  # Python writes what is left when it ends
            os.dup2(nowhere, stream.fileno())
    sys.exit(code)


def exit_code(main, when_stopped):
    """Calls main, says its error in one sentence, and returns the script's exit code."""
    try:
        main()
    except SystemExit as stop:  # of --help, for example
        return stop.code
    except BrokenPipeError:
        raise
    except (ValueError, OSError) as error:
        print(printable(f"error: {error}"), file=sys.stderr)
        return 2
    except torch.OutOfMemoryError as error:
        what = str(error).splitlines()[0]
        print(f"error: {what} Less memory is needed with a smaller --micro-batch or "
              "--checkpointing in training, and with a smaller --batch elsewhere", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(when_stopped, file=sys.stderr)
        return 130
    return 0


class Help(argparse.HelpFormatter):
    """--help that ends a flag's line with its default, unless there is none or the line names it.

    A parser gets it as its formatter_class.
    """

    def _get_help_string(self, action):
        default = action.default
        has_none = default is None or default is False or default is argparse.SUPPRESS
        if has_none or "default" in action.help:
            return action.help
        if isinstance(default, list):
            default = " ".join(map(str, default))
        text = str(default).replace("%", "%%")  # argparse takes a % for one of its own marks
        return f"{action.help} (default: {text})"


def refuse(problems):
    """Raises one ValueError that names all problems, if there are any."""
    if problems:
        raise ValueError("; ".join(problems))


def warn(sentence):
    """Prints a warning; of several processes that torchrun has started, only the first does."""
    if os.environ.get("RANK", "0") == "0":
        print(printable(f"warning: {sentence}"), file=sys.stderr)


def printable(text):
    """The text with its control characters escaped, so that a terminal shows it and obeys nothing.

    New lines and tabs stay.
    """
    shown = []
    for character in text:
        is_control = unicodedata.category(character).startswith("C")
        if is_control and character not in "\n\t":
            character = ascii(character)[1:-1]
        shown.append(character)
    return "".join(shown)


def pick_device(dtype, device, trains=False):
    """(torch dtype, torch device) of the flags --dtype and --device. ValueError if there is none.

    device None: CUDA if there is one. dtype "auto": bfloat16 where the processor multiplies it.
    Elsewhere it is float32, but float16 for predictions on a GPU, which multiplies that fast.
    Training does not use float16: small gradients would underflow, and the loss is not scaled here.
    """
    if device is None:
        device = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(device)
        torch.empty(1, device=device)
        torch.set_float32_matmul_precision("highest")  # some GPU images have TF32 instead
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"device {device}: {str(error).splitlines()[0]}") from None

    if dtype == "auto":
        dtype = "bfloat16"
        if not multiplies_bfloat16(device):
            dtype = "float16" if device.type == "cuda" and not trains else "float32"
    name = dtype_name(dtype)
    if name not in ("float32", "bfloat16", "float16"):
        raise ValueError(f"dtype is {name}, expected float32, bfloat16 or float16")
    return getattr(torch, name), device


def multiplies_bfloat16(device):
    """Whether the processor has instructions for bfloat16; otherwise it is emulated, slowly."""
    if device.type == "cpu":
        cpu = torch.cpu.get_capabilities()
        return bool(cpu.get("avx512_bf16") or cpu.get("amx_bf16"))
    if device.type == "cuda":  # before Ampere it has none, but says that it supports it
        with torch.cuda.device(device):
            return torch.cuda.is_bf16_supported(including_emulation=False)
    return True


def dtype_name(dtype):
    """torch.float32 -> "float32", as flags and files have it."""
    return str(dtype).removeprefix("torch.")


def versions():
    """{package: version} of what a result depends on."""
    found = {"python": sys.version.split()[0]}
    for package in ("torch", "numpy", "safetensors", "tokenizers"):
        found[package] = version(package)
    return found


def peak_memory(device):
    """The most memory that this process had, and that of its GPU, as a phrase."""
    own = peak_bytes()
    if device.type != "cuda":
        return f"{own / 1e9:.1f} GB of memory"
    on_gpu = torch.cuda.max_memory_allocated(device)
    return f"{own / 1e9:.1f} GB of memory, {on_gpu / 1e9:.1f} GB on the GPU"


def peak_bytes():
    """The most memory that this process had, in bytes."""
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    if sys.platform == "darwin":  # macOS counts bytes, Linux units of 1,024 bytes
        return peak
    return 1024 * peak


def keep_freed_memory():
    """Tells glibc's malloc to keep what is freed: a tenth of a training step's time on a CPU.

    By default it hands large blocks back to the system, and the next step pays for fresh pages.
    """
    M_MMAP_MAX, M_TRIM_THRESHOLD = -4, -1
    with suppress(OSError, AttributeError, TypeError):  # another C library has no mallopt
        libc = ctypes.CDLL(None)
        libc.mallopt(M_MMAP_MAX, 0)  # no block gets a mapping of its own
        libc.mallopt(M_TRIM_THRESHOLD, 2**30)


@contextmanager
def stop_signals():
    """A list that the first Ctrl-C or SIGTERM is added to, so that work can finish cleanly.

    The second one acts at once, but not in a process of torchrun.
    """
    caught = []
    handlers_before = {}
    # torchrun passes a signal on that its process may have got already: the second is no wish
    is_of_torchrun = "TORCHELASTIC_RUN_ID" in os.environ

    def note(number, frame):
        sentence = b"\nstopping after this step; the next Ctrl-C stops at once\n"
        if is_of_torchrun:
            sentence = b"\nstopping after this step; if that takes long, torchrun ends it\n"
        # not by print: the signal may come while the progress bar is being written
        with suppress(OSError):
            os.write(2, sentence)
        caught.append(number)
        signal.signal(number, signal.SIG_IGN if is_of_torchrun else handlers_before[number])

    for number in (signal.SIGINT, signal.SIGTERM):
        handlers_before[number] = signal.signal(number, note)
    try:
        yield caught
    finally:
        for number, handler in handlers_before.items():
            signal.signal(number, handler)
