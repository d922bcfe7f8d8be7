"""Validation rows, split off by whole groups."""

import json
import math

import numpy as np


def split_valid(rows, fraction, seed):
    """The rows as (train, valid). Whole groups, so that valid comes nearest to the fraction.

    What counts is the rows of each class, so that both classes keep their share as far as groups
    allow. A row without a group is a group of its own. The groups are tried in random orders, and
    the order that comes nearest is kept.

    ValueError if no choice gives both sides both classes, and valid between half and twice the rows
    that it should have.
    """
    groups = {}
    for index, row in enumerate(rows):
        key = row.get("group", ("row", index))
        groups.setdefault(key, []).append(row)
    groups = list(groups.values())

    # pairs: (rows of class 0, rows of class 1)
    sizes = [count_classes(group) for group in groups]
    totals = count_classes(rows)
    wanted = [min(max(1, fraction * total), total - 1) for total in totals]

    best = None
    least = math.inf
    rng = np.random.default_rng(seed)
    for _ in range(100):
        order = rng.permutation(len(groups)).tolist()
        chosen = choose_groups(sizes, order, wanted, totals)
        counts = count_classes(row for index in chosen for row in groups[index])

        has_both = all(0 < count < total for count, total in zip(counts, totals, strict=True))
        fits = sum(wanted) / 2 <= sum(counts) <= 2 * sum(wanted)
        distance = math.dist(counts, wanted)
        if has_both and fits and distance < least:
            best = chosen
            least = distance
        if least < 0.75:  # half a row in each class: no choice comes nearer
            break

    if best is None:
        raise ValueError(f"--valid-fraction {fraction}: {why_no_split(groups, wanted)}; "
                         f"give --valid, or another --valid-fraction")
    valid = [row for index in best for row in groups[index]]
    left = set(range(len(groups))) - set(best)
    train = [row for index in sorted(left) for row in groups[index]]
    return train, valid


def choose_groups(sizes, order, wanted, totals):
    """The numbers of the groups that are taken in this order: the first, and what brings us nearer.

    A group that would be too much is passed over: twice the wanted rows, or all rows of a class.
    sizes: (rows of class 0, rows of class 1) of each group; wanted: of all that are taken; totals:
    of all groups.
    """
    chosen = []
    zeros = 0
    ones = 0
    distance = math.inf
    for index in order:
        if zeros >= wanted[0] and ones >= wanted[1]:
            break
        more_zeros = zeros + sizes[index][0]
        more_ones = ones + sizes[index][1]
        too_many = more_zeros + more_ones > 2 * sum(wanted)
        leaves_none = more_zeros == totals[0] or more_ones == totals[1]
        if too_many or leaves_none:
            continue
        new_distance = math.dist((more_zeros, more_ones), wanted)
        if new_distance <= distance:
            chosen.append(index)
            zeros = more_zeros
            ones = more_ones
            distance = new_distance
    return chosen


def count_classes(rows):
    """(rows of class 0, rows of class 1)."""
    counts = [0, 0]
    for row in rows:
        counts[row["label"]] += 1
    return counts


def why_no_split(groups, wanted):
    """Why no choice of whole groups can be the validation rows, as a phrase."""

    def named(group):
        if "group" not in group[0]:
            return f"row {group[0]['id']!r}"
        return f"group {group[0]['group']!r} ({len(group)} rows)"

    for label in (0, 1):
        holders = [group for group in groups if count_classes(group)[label]]
        if len(holders) == 1:
            return (f"one side would have one class only, since all rows of label {label} are in "
                    f"{named(holders[0])}")

    least = math.ceil(sum(wanted) / 2)
    most = math.floor(2 * sum(wanted))
    return (f"no choice of whole groups takes {least} to {most} rows for validation, with both "
            f"classes on both sides; the largest is {named(max(groups, key=len))}")


# --- before groups were weighed by their rows -----------------------------------------------------
def split_valid_formerly(path, rows, fraction, seed):
    """The rows of a file as (train, valid). Whole groups fill valid until it has the fraction.

    A training that was stopped before the rule changed continues with the rows that it had.
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
