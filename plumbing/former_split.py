"""How validation rows were split off before groups were weighed by their rows.

A training that was stopped then continues with the rows that it had, and the tables of
docs/results.md were made with this split.
"""

import json

import numpy as np


def split_valid_formerly(path, rows, fraction, seed):
    """The rows of a file as (train, valid). Whole groups fill valid until it has the fraction.

    A blank group counted as a group, so the groups are read from the file once more. ValueError if
    a side lacks one of the classes.
    """
    groups = {}
    with open(path, "rb") as file:
        for index, (row, line) in enumerate(zip(rows, file, strict=False)):
            key = json.loads(line.decode("utf-8-sig")).get("group")
            if key is None:
                key = ("row", index)
            groups.setdefault(key, []).append(row)

    keys = list(groups)
    order = np.random.default_rng(seed).permutation(len(keys))
    valid = []
    for index in order:
        if len(valid) >= fraction * len(rows):
            break
        valid += groups.pop(keys[index])

    train = []
    for group in groups.values():  # those that are left
        train += group

    for name, side in (("training", train), ("validation", valid)):
        if len({row["label"] for row in side}) < 2:
            raise ValueError(f"the {name} side of --valid-fraction {fraction} has one class only")
    return train, valid
