"""HTML and SVG in which every text is escaped: what stands in a row never becomes markup."""

import html
import json
import re

# Control characters, which browsers drop or replace, and those that turn the direction of a text
# round, so that it reads as another one. Tabs and line breaks stay
HIDDEN = re.compile(r"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f"
                    r"\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]")


class Markup(str):
    """A string that is markup already. Every other string is a text, and `tag` escapes it."""


def visible(text):
    """The text with its hidden characters as codes, such as ⟨U+202E⟩. report.js has the same."""
    return HIDDEN.sub(lambda match: f"⟨U+{ord(match[0]):04X}⟩", text)


def escaped(value):
    """A value as markup: a text, escaped, or markup as it is."""
    if isinstance(value, Markup):
        return value
    return Markup(html.escape(visible(str(value))))


def tag(name, *children, **attributes):
    """An element with its children, each a text or markup: tag("a", "top", href="#top", id=None).

    A name that Python does not take as one ends in a blank line below: class_. Between words, the
    line becomes a hyphen: aria_label. An attribute of None is left out.
    """
    written = ""
    for key, value in attributes.items():
        if value is not None:
            key = key.rstrip("_").replace("_", "-")
            written += f' {key}="{escaped(value)}"'
    inside = "".join(map(escaped, children))
    return Markup(f"<{name}{written}>{inside}</{name}>")


def joined(parts):
    """Several texts or pieces of markup as one, a line each."""
    return Markup("\n".join(map(escaped, parts)))


def json_text(value):
    """A value as JSON that may stand in a <script>: no "<" in it, so nothing ends the script."""
    text = json.dumps(value, ensure_ascii=False, separators=(",", ":"))
    return text.replace("<", "\\u003c")
