"""Which words of a text an explanation cites: those that stand in both and say something."""

import re
from collections import Counter
from itertools import pairwise

WORD = re.compile(r"\w+")
FUNCTION_WORDS = set(
    "a an and any are as at be been but by can did do does for from had has have he her his if in "
    "into is it its may might no nor not of on or she so than that the their then there these they "
    "this those to was were which who will with would".split())

FEWEST_TEXTS = 20  # from so many texts on, a word that most of them have cites none of them


def words_in_order(text):
    """The words of a text in their order, in lower case."""
    return WORD.findall(text.lower())


def words_of(text):
    """The set of the different words of a text, in lower case."""
    return set(words_in_order(text))


def common_words(texts):
    """The set of words that more than half of the texts have, such as "patient" in notes."""
    if len(texts) < FEWEST_TEXTS:
        return set()
    counts = Counter()
    for text in texts:
        counts.update(words_of(text))
    return {word for word, count in counts.items() if count > len(texts) / 2}


def citations(text, explanation, common):
    """(places in the text, places in the explanation) of the words that the explanation cites.

    These are the words that both have, without function words. A word that most texts have, such as
    "failure", counts only where both have its neighbour, too: "heart failure".
    """
    shared = (words_of(text) & words_of(explanation)) - FUNCTION_WORDS
    pairs = set(pairwise(words_in_order(text))) & set(pairwise(words_in_order(explanation)))
    pairs = {pair for pair in pairs if shared.issuperset(pair)}
    return places(text, shared - common, pairs), places(explanation, shared - common, pairs)


def places(text, words, pairs):
    """Where words and pairs of words stand in a text: [start, end, start, end, ...], for a browser.

    Neighbours with nothing but a blank between them are one place. The numbers count UTF-16 units,
    as JavaScript does.
    """
    matches = list(WORD.finditer(text))
    spelled = [match[0].lower() for match in matches]
    cited = [word in words for word in spelled]
    for i, pair in enumerate(pairwise(spelled)):
        if pair in pairs:
            cited[i] = True
            cited[i + 1] = True

    found = []
    for match, is_cited in zip(matches, cited, strict=True):
        if not is_cited:
            continue
        if found and text[found[-1] : match.start()].isspace():
            found[-1] = match.end()
        else:
            found += [match.start(), match.end()]

    if text and max(text) > "\uffff":  # an emoji, for example, is two units
        found = [len(text[:place].encode("utf-16-le")) // 2 for place in found]
    return found
