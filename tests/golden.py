"""Writes tests/golden.json: logits of transformers for the tiny models of test_model.py, so that
the main test of the transformer holds where transformers is not installed.

    python tests/golden.py
"""

import json
import tempfile
from pathlib import Path

import torch
import transformers
from conftest import write_model
from test_model import GOLDEN, GOLDEN_IDS, VARIANTS


def main():
    logits = {}
    for name, changes in VARIANTS.items():
        with tempfile.TemporaryDirectory() as folder, torch.no_grad():
            write_model(Path(folder), **changes)
            model = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
            # the last token has seen all others; 8 of the 400 logits tell one model from another
            logits[name] = model(GOLDEN_IDS).logits[0, -1, :8].tolist()
    text = {"transformers": transformers.__version__, "torch": torch.__version__, "logits": logits}
    GOLDEN.write_text(json.dumps(text, indent=1) + "\n")


if __name__ == "__main__":
    main()
