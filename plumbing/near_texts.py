"""Near-duplicates: texts that have many runs of five words in common."""

import math
import re
from collections import Counter

import numpy as np
from tqdm import tqdm


def count_near_texts(train, test):
    """How many test rows have at least half of their shingles in common with one training row.

    That is Jaccard's index, |A and B| / |A or B| >= 1/2 (Broder 1997). Shingles of most rows, such
    as a header's, do not count. The test rows are indexed by the hashes of their shingles, in
    arrays, and the training rows pass by one after the other.
    """
    common = common_shingles(train)
    of_row = [hashes(row["text"], common) for row in test]
    sizes = np.array([len(own) for own in of_row])

    # each shingle of a test row, and the row: sorted by shingle
    keys = np.concatenate(of_row)
    holders = np.repeat(np.arange(len(test)), sizes)
    order = np.argsort(keys)
    keys = keys[order]
    holders = holders[order]

    near = np.zeros(len(test), dtype=bool)
    for row in tqdm(train, desc="near texts", unit="row", delay=3, leave=False):
        own = hashes(row["text"], common)
        first = np.searchsorted(keys, own, "left")
        last = np.searchsorted(keys, own, "right")
        held = np.flatnonzero(last > first)  # those of its shingles that a test row has
        if len(held) > 0:
            sharing = np.concatenate([holders[first[i] : last[i]] for i in held])
            both = np.bincount(sharing, minlength=len(test))
            either = len(own) + sizes - both
            near |= 2 * both >= either
    return int(near.sum())


def common_shingles(rows):
    """The hashes of the shingles that most rows have, as far as a thousand rows tell."""
    sample = rows[:: math.ceil(len(rows) / 1000)]
    counts = Counter()
    for row in sample:
        counts.update(map(hash, shingles(row["text"])))
    # at least ten rows: in a file of three, what two rows share says nothing
    return {shingle for shingle, count in counts.items() if count > max(10, len(sample) / 2)}


def hashes(text, common):
    """The hashes of a text's shingles (S,), without the common ones; all if none is left."""
    own = set(map(hash, shingles(text)))
    if not own <= common:
        own -= common
    return np.array(list(own))


# Characters of scripts without blanks between words: Thai, Lao, Tibetan, Burmese, Khmer, Japanese,
# Chinese. Each is a unit of its own.
UNSPACED = (
    "\u0e00-\u109f\u1780-\u17ff\u3005\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"
    "\U00020000-\U0003ffff"
)
UNIT = re.compile(rf"[{UNSPACED}]|[^\W{UNSPACED}]+")


def shingles(text):
    """The set of a text's runs of five units, words or unspaced characters.

    A shorter text is one run.
    """
    units = UNIT.findall(text.lower())
    runs = max(1, len(units) - 4)
    return {tuple(units[i : i + 5]) for i in range(runs)}
