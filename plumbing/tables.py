"""Tables for the terminal."""

from itertools import zip_longest


def table(columns, keys):
    """The text of a table: a line for each name in {name: {key: value}}, a column for each key.

    A value stands next to its interval, {key: (low, high)} in the dict's `intervals`, if it has
    one; a missing value is n/a. Keys are broken at "_", so that columns stay narrow.
    """
    heading_parts = [key.split("_") for key in keys]
    lines = []
    for parts in zip_longest(*heading_parts, fillvalue=""):
        lines.append(["", *parts])
    for name, values in columns.items():
        cells = [cell(values, key) for key in keys]
        lines.append([name, *cells])

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
