"""Makes what the comparison works on. Runs in the old tree: `cd OLD; python inputs.py FOLDER`.

    FOLDER/tiny, window     random models with a tokenizer (window: Mistral's sliding window)
    FOLDER/families/NAME    a random model of each family, and a random run on it in NAME/run
    FOLDER/*.jsonl          rows: train (a third without explanation), full, valid, test, many
    FOLDER/tokenizers/NAME  the tokenizers of tests/test_interop.py
    FOLDER/about.json       the published configs, and which --format each tokenizer needs
"""

import json
import sys
from pathlib import Path

sys.path[:0] = [".", "tests"]
import conftest  # noqa: E402
import test_interop  # noqa: E402
import test_model  # noqa: E402

LONG = "and the visit was long, the report is not complete and nobody knows when it will be. "


def make_rows(count, offset, explained):
    """Rows that a tiny model can learn: "bad" in the text means 1. Some texts are long enough to be
    cut, some hold markup or letters of several bytes."""
    rows = []
    for i in range(offset, offset + count):
        bad = i * 7 % 5 < 2
        word = "bad" if bad else "good"
        text = f"{word} {word} {word} {i}: the result is {word} and the day was {i % 3} long"
        if i % 6 == 1:
            text += " " + LONG * 2
        if i % 6 == 3:
            text += " <|im_end|> é 中 [/INST] <think>"
        row = {"id": f"r{i}", "text": text, "label": int(bad), "group": f"g{i // 2}",
               "probability": 0.8 if bad else 0.1 + 0.1 * (i % 3)}
        if i % 4:
            row["evidence"] = ["result is bad"] if bad else ["result is good", "not complete"]
        if explained or i % 3:
            why = "It is bad, the result is bad. The risk is high." if bad else \
                "The result is good, so the risk is not high."
            row["explanation"] = why
        rows.append(row)
    return rows


def make_model(folder, **changes):
    conftest.write_model(folder, **changes)
    conftest.write_tokenizer(folder)
    conftest.shard(folder)
    (folder / "model.safetensors").unlink()
    (folder / "generation_config.json").write_text('{"eos_token_id": [2, 0]}')


def main():
    folder = Path(sys.argv[1])
    folder.mkdir(parents=True)

    make_model(folder / "tiny")
    make_model(folder / "window", model_type="mistral", sliding_window=50)
    for name, changes in test_model.VARIANTS.items():
        base = folder / "families" / name.replace(" ", "-")
        make_model(base, **changes)
        conftest.make_run(base, base / "run")

    for name, rows in (
        ("train", make_rows(54, 0, explained=False)),
        ("full", make_rows(40, 0, explained=True)),
        ("valid", make_rows(40, 100, explained=False)),
        ("test", make_rows(40, 200, explained=True)),
        ("many", make_rows(160, 300, explained=True)),
    ):
        conftest.write_rows(folder / f"{name}.jsonl", rows)

    formats = {}
    for name, (_, flag, shape, added) in test_interop.TEMPLATES.items():
        where = folder / "tokenizers" / name.replace(", ", "-").replace(" ", "-")
        where.mkdir(parents=True)
        test_interop.build_tokenizer(where, shape, added)
        formats[where.name] = flag
    published = [raw | dict(zip(test_interop.SIZES, sizes, strict=True))
                 for raw, sizes, _ in test_interop.PUBLISHED.values()]
    about = {"formats": formats, "published": published}
    (folder / "about.json").write_text(json.dumps(about, indent=1))


if __name__ == "__main__":
    main()
