"""Fields of a row under other names than ours."""

from difflib import get_close_matches
from functools import lru_cache

COMMON_NAMES = {  # what others call a field
    "text": ("sentence", "content", "input", "document", "note", "passage", "abstract"),
    "label": ("class", "target", "outcome", "y"),
    "explanation": ("rationale", "reason", "reasoning", "justification", "explain", "why"),
    "id": ("uid", "guid", "index", "key", "row_id"),
    "group": ("group_id", "patient", "patient_id", "subject", "subject_id", "document_id"),
    "probability": ("prob", "p", "true_p"),
    "evidence": ("highlights", "spans"),
}


@lru_cache
def likely_field(name):
    """The known field that an unknown one seems to be, or None.

    It has another common name, or it is misspelt.
    """
    name = name.strip().lower()
    for field, others in COMMON_NAMES.items():
        if name in others:
            return field
    close = get_close_matches(name, COMMON_NAMES, n=1, cutoff=0.8)
    return close[0] if close else None


def unknown_fields(raw, known):
    """The fields of an object that nothing reads: (name, the known field that it seems to be).

    The second is None if nothing is like it, or if the object has that field too.
    """
    found = []
    for name in raw.keys() - known.keys():
        likely = likely_field(name)
        found.append((name, None if likely in raw else likely))
    return found


def name_unknown_fields(path, unknown):
    """Prints one line on the fields that nothing reads, {(name, likely field): rows}, if any."""
    shown = []
    for (name, likely), count in unknown.most_common(10):
        meant = f"; is {likely} meant?" if likely else ""
        shown.append(f"{name[:60]!r} ({count} rows{meant})")
    if len(unknown) > 10:
        shown.append(f"{len(unknown) - 10} more")
    if shown:
        print(f"warning: {path}: fields that nothing reads: {', '.join(shown)}")
