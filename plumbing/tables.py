"""Tables for the terminal."""

from itertools import zip_longest


def table(columns, keys, headings=None):
    """The text of a table: a line for each name in {name: {key: value}}, a column for each key.

    A value stands next to its interval, {key: (low, high)} in the dict's `intervals`, if it has
    one; a missing value is n/a. headings: {key: words} for the keys that say too little. Each word
    of a heading has a line of its own, so that columns stay narrow.
    """
    heading_words = []
    for key in keys:
        words = key.replace("_", " ")
        if headings is not None:
            words = headings.get(key, words)
        heading_words.append(words.split(" "))

    lines = []
    for parts in zip_longest(*heading_words, fillvalue=""):
        lines.append(["", *parts])
    for name, values in columns.items():
        cells = [cell(values, key) for key in keys]
        lines.append([name, *cells])

    return aligned(lines)


def aligned(lines):
    """Lines of cells as text, with every column as wide as its widest cell."""
    widths = []
    for column in zip(*lines, strict=True):
        widths.append(max(map(len, column)))

    shown = []
    for line in lines:
        padded = map(str.ljust, line, widths)
        shown.append("  ".join(padded).rstrip())
    return "\n".join(shown)


def cell(values, key):
    """The text of one value: yes, no, n/a, a whole number, or three decimals and the interval."""
    value = values.get(key)
    if value is None:
        return "n/a"
    if value is True:
        return "yes"
    if value is False:
        return "no"

    text = str(value)
    if isinstance(value, float):
        text = f"{value:.3f}"
    interval = values.get("intervals", {}).get(key)
    if interval:
        low, high = interval
        text += f" [{low:.3f}, {high:.3f}]"
    return text
