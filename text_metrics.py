"""Is an explanation still a text, does it cite the evidence, and does it fit the probability?

In reading order: repetition; reading ease; evidence that is cited; what is left of the language
model; and at the end `text_metrics`, which collects all metrics of explanations in one dict.
Each function gives its definition and its source. Only numpy is needed.

A new metric is one function, and one line in the table of `text_metrics`.
"""

import re

import numpy as np

from metrics import (
    auroc, cohen_kappa, matched_kappa, mean_or_none, none_if_undefined, per_token, rereading,
    risk_coverage)

# A word or one punctuation mark: collapsed text such as ")))" has words, too
WORD = re.compile(r"\w+|[^\w\s]")


def ngrams(text, n):
    """The runs of n words in a text, in lower case, as tuples."""
    words = WORD.findall(text.lower())
    starts = range(len(words) - n + 1)
    return [tuple(words[i : i + n]) for i in starts]


def repetition(texts):
    """(distinct-2, rep-4): how much texts repeat each other, and how much a text repeats itself.

    Distinct-2 (Li et al. 2016) is the share of different 2-grams among those of all texts; it falls
    with the amount of text. Rep-4 (Welleck et al. 2020) is 1 minus the share of different 4-grams
    in one text, as a mean over the texts that have any. None where no text is long enough.
    """
    pairs = []  # of all texts together
    repeated = []  # of each text by itself
    for text in texts:
        pairs.extend(ngrams(text, 2))
        fours = ngrams(text, 4)
        if fours:
            repeated.append(1 - len(set(fours)) / len(fours))

    distinct_2 = None
    if pairs:
        distinct_2 = len(set(pairs)) / len(pairs)
    return distinct_2, mean_or_none(repeated)


def syllables(word):
    """The number of syllables of an English word: its groups of vowels, without a silent last e."""
    without_silent_e = re.sub("(?<=[^l])e$", "", word)
    return max(1, len(re.findall("[aeiouy]+", without_silent_e)))


def flesch(text):
    """How easy an English text is to read (Flesch 1948): about 0 (hard) to 100 (easy).

        206.835 - 1.015 words per sentence - 84.6 syllables per word

    None for fewer than two sentences, and for collapsed text (rep-4 of .25 or more), which could
    score well.
    """
    pieces = re.split(r"[.!?]+(?:\s|$)", text)
    sentences = [piece for piece in pieces if re.search(r"\w", piece)]
    words = re.findall(r"[^\W\d_]+", text.lower())
    if len(sentences) < 2 or not words:
        return None
    _, rep_4 = repetition([text])
    if rep_4 is not None and rep_4 >= 0.25:
        return None

    n_syllables = sum(map(syllables, words))
    return 206.835 - 1.015 * len(words) / len(sentences) - 84.6 * n_syllables / len(words)


def spelled(text):
    """The words of a text between single blanks, so that `in` finds only whole words of it."""
    return " ".join(["", *WORD.findall(text.lower()), ""])


def evidence_phrases(row):
    """The set of a row's evidence phrases, `spelled`, without blank ones."""
    phrases = row.get("evidence") or []
    return {spelled(phrase) for phrase in phrases} - {" "}


def known_phrases(rows):
    """The set of the evidence phrases of all rows, `spelled`."""
    known = set()
    for row in rows:
        known |= evidence_phrases(row)
    return known


# A phrase is cited as absent if a word of the first kind stands before it in its clause, or one of
# the second kind after it in its sentence, before the next phrase
CLAUSE_END = re.compile(r" (?:[.,;:!?]|but|though|although|while) ")
SENTENCE_END = re.compile(r" [.;!?] ")
ABSENT_BEFORE = re.compile(r" (?:no|not|never|nor|neither|without|denies|denied|absence of) ")
ABSENT_AFTER = re.compile(r" (?:absent|denies|denied|none|ruled out|not (?:present|confirmed)) ")


def cited_phrases(text, known):
    """The phrases of a set that a text cites, as whole words, other than as absent.

    In "No heart failure. Kidney failure was ruled out, sepsis was not." and in "without sepsis"
    none is cited. A phrase that also stands somewhere else in the text, asserted, is cited. The
    rule is short: it takes no notice of double negation, or of a list behind a comma, as in "no
    sepsis, no falls, heart failure".

    known: `spelled` phrases.
    """
    text = spelled(text)
    places = []  # (start, end) of every phrase, with one blank on each side
    for phrase in known:
        for match in re.finditer(f"(?={re.escape(phrase)})", text):
            places.append((match.start(), match.start() + len(phrase)))

    cited = set()
    for start, end in places:
        before = CLAUSE_END.split(text[: start + 1])[-1]
        following = [other for other, _ in places if other >= end - 1]
        next_start = min(following, default=len(text))
        after = SENTENCE_END.split(text[end - 1 : next_start + 1])[0]

        # each blank belongs to the word on either side of it
        is_absent = ABSENT_BEFORE.search(f" {before} ") or ABSENT_AFTER.search(f" {after} ")
        if not is_absent:
            cited.add(text[start:end])
    return cited


def evidence_scores(rows, texts, file_rows):
    """(recall, precision, invented) of the evidence phrases that explanations cite.

    Recall is the share of a row's own phrases that its explanation cites, see `cited_phrases`. An
    explanation may also cite phrases of other rows of the file. Of all the phrases that it cites,
    precision is the share of the row's own, and invented is the share that the row's text does not
    contain. Each is a mean over the rows with the field `evidence` where it is defined; None if
    there are none.

    rows: the N rows that were explained; texts: their N explanations; file_rows: all rows.
    """
    known = known_phrases(file_rows)

    recall = []
    precision = []
    invented = []
    for row, text in zip(rows, texts, strict=True):
        own = evidence_phrases(row)
        cited = cited_phrases(text, known)
        if own:
            recall.append(len(cited & own) / len(own))
        if cited and "evidence" in row:
            row_text = spelled(row["text"])
            precision.append(len(cited & own) / len(cited))
            invented.append(mean_or_none([phrase not in row_text for phrase in cited]))
    return mean_or_none(recall), mean_or_none(precision), mean_or_none(invented)


def collapse(predictions, sums):
    """Metrics of whether a run is still a language model, as a dict.

    predictions: its N records, with the texts that it wrote. sums (N, 3): its reference_sums, which
    for each row are the sum of -log p(token) over the reference explanation, the sum of
    KL(run || base model), and the number of tokens.
    """
    texts = [prediction["explanation"] for prediction in predictions]
    distinct_2, rep_4 = repetition(texts)
    return {
        "parsable": mean_or_none([one["stated_label"] is not None for one in predictions]),
        "empty": mean_or_none([not text.strip() for text in texts]),
        "distinct_2": distinct_2,
        "rep_4": rep_4,
        "reference_nll": none_if_undefined(per_token, None, sums[:, [0, 2]]),
        "base_kl": none_if_undefined(per_token, None, sums[:, [1, 2]]),
    }


STATES_NO_LABEL = np.inf  # counts as a third label, next to 0 and 1


def text_metrics(rows, predictions, rereadings, sums, file_rows, seed=0):
    """All metrics of the explanations, as a dict: agreement with p, collapse, and evidence.

    rows, predictions: the N rows that were explained, and their records. rereadings: for each a
    record of its explanation, None where that is empty, see `rereading`. sums (N, 3): the rows'
    reference_sums, see `collapse`. file_rows: all rows of the file, see `evidence_scores`. A value
    is None where there is nothing to measure.
    """
    texts = [prediction["explanation"] for prediction in predictions]
    p = np.array([prediction["probability"] for prediction in predictions])
    at_half = (p >= 0.5).astype(np.int64)
    correct = at_half == [row["label"] for row in rows]

    # A text that states no label agrees with neither class
    stated = [prediction["stated_label"] for prediction in predictions]
    stated = np.array(stated, dtype=np.float64)  # None becomes NaN
    stated[np.isnan(stated)] = STATES_NO_LABEL
    agrees = at_half == stated

    # The rows whose text states a label
    states = stated != STATES_NO_LABEL
    p_states = p[states]
    stated_label = stated[states]
    groups = [rows[i].get("group") for i in np.flatnonzero(states)]

    # The rows whose explanation was read again
    reread = [i for i, record in enumerate(rereadings) if record is not None]
    first = [predictions[i] for i in reread]
    second = [rereadings[i] for i in reread]

    # If rows are left undecided: first those whose text disagrees with p, then those with p near .5
    confidence = (agrees + np.abs(p - 0.5)) / 2
    agree_coverage_at_95 = None
    risk = none_if_undefined(risk_coverage, correct, confidence)
    if risk is not None:
        _, _, agree_coverage_at_95 = risk

    evidence_recall, evidence_precision, evidence_invented = evidence_scores(rows, texts, file_rows)
    reading_ease = [ease for ease in map(flesch, texts) if ease is not None]

    # A NEW METRIC of texts goes here, in one line
    return {
        "n_explained": len(texts),
        "n_parsable": int(states.sum()),
        "auroc_alignment": none_if_undefined(auroc, stated_label, p_states),
        "kappa_matched": none_if_undefined(matched_kappa, stated_label, p_states, groups, seed),
        "kappa_all": none_if_undefined(cohen_kappa, at_half, stated),
        **rereading(first, second, seed),
        "agree_share": mean_or_none(agrees),
        "agree_accuracy": mean_or_none(correct[agrees]),
        "agree_coverage_at_95": agree_coverage_at_95,
        **collapse(predictions, sums),
        "flesch": mean_or_none(reading_ease),
        "n_flesch": len(reading_ease),
        "evidence_recall": evidence_recall,
        "evidence_precision": evidence_precision,
        "evidence_invented": evidence_invented,
    }
