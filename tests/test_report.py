"""report.py: one page that is right, whole, small enough, and in which no row can do anything.

Every test names the mutation that it would catch. Those of the page at work need Chromium
(`apt-get install chromium chromium-driver`), and say so where they are skipped.
"""

import json
import re

import numpy as np
import pytest
from browser import PROGRAMS, Browser
from conftest import ROOT, assert_refused, make_run, run_script, write_rows

import eval as ev
from metrics import curves, score_metrics
from plumbing.citations import FEWEST_TEXTS, citations, common_words
from plumbing.drawings import tick_text, ticks
from plumbing.files import sha256_of
from plumbing.markup import Markup, escaped, json_text, tag
from report import main, write_report

HOSTILE = [
    "<script>window.hacked = 1</script>",
    "</script><script>window.hacked = 1</script>",
    "<!--<script>window.hacked = 1",
    "<img src=x onerror='window.hacked = 1'>",
    "javascript:window.hacked=1",
    "\"'`><svg onload=window.hacked=1>",
    "&lt;b&gt; &amp; $title ${title} {title}",
    "a\x00b\x07c\x1b[31md\x7f",
    "abc \u202eevil\u202c \u2066x\u2069 \u200f",
    "\u2028\u2029 \ufffe",
    "𝒳 🙂 bad",
]


def write_evaluation(folder, y, p, texts, explanations, ids=None, threshold=0.5, names=("runs/x",),
                     **changes):
    """What eval.py writes for runs of these probabilities, without any model."""
    folder.mkdir(parents=True, exist_ok=True)
    if ids is None:
        ids = [f"r{i}" for i in range(len(y))]
    rows = []
    for name, text, label in zip(ids, texts, y, strict=True):
        rows.append({"id": name, "text": text, "label": int(label)})
    data = write_rows(folder / "rows.jsonl", rows)

    decisions = (p >= threshold).astype(int)
    metrics = {"calibrated": True, **score_metrics(y, p, decisions, draws=5), "prompts_cut": 1}
    lines = []
    for i, name in enumerate(ids):
        lines.append(json.dumps({
            "id": name, "probability": float(p[i]), "raw_probability": float(p[i]),
            "label": int(decisions[i]), "threshold": threshold, "explanation": explanations[i],
            "stated_label": 1, "tokens_cut": int(i == 0), "true_label": int(y[i])}) + "\n")
    about = {
        "folder": None, "fingerprint": "0123456789ab", "base": "models/<base>",
        "base_fingerprint": "ffff", "scorer": "head", "curves": curves(y, p, draws=3),
        "prompts": {"question": "Is it <bad>?", "labels": ["no", "yes"]},
        "fitted": {"scorer": "head", "calibration": {"temperature": 1.5, "bias": 0.25},
                   "threshold": threshold, "base_rate": 0.5}}
    results = {
        "metrics": {"head": metrics, "majority": score_metrics(y, np.full(len(y), 0.5), draws=5)},
        "n": len(y), "positives": int(np.sum(y)), "groups": len(y), "bayes_auroc": 0.9,
        "warnings": [], "data": {"file": str(data), "sha256": sha256_of(data)},
        "date": "2026-11-26T10:00+00:00", "seconds": 1.0, "versions": {"torch": "2"},
        "runs": {name: about for name in names}, **changes}
    (folder / "eval.json").write_text(json.dumps(results))
    (folder / "predictions.jsonl").write_text("".join(lines * len(names)))
    return folder


def simulated(folder, n=200, length=60, **more):
    """An evaluation of n rows with texts of about `length` characters."""
    rng = np.random.default_rng(0)
    p = rng.random(n)
    y = (rng.random(n) < p).astype(int)
    texts = [f"row {i} is bad " + "x" * (length - 15) for i in range(n)]
    return write_evaluation(folder, y, p, texts, ["It is bad."] * n, **more)


def read(path):
    """(the page, the data in it)."""
    page = path.read_text(encoding="utf-8")
    block = re.search(r'<script type="application/json" id="data">(.*?)</script>', page, re.DOTALL)
    return page, json.loads(block[1])


def in_words(page):
    """The page's text without tags, its blanks made one."""
    text = re.sub(r"<script.*?</script>|<style>.*?</style>|<[^>]*>", " ", page, flags=re.DOTALL)
    return re.sub(r"\s+", " ", text)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory, tiny):
    """eval.py's own results on hostile rows, with a run whose folder is hostile, too."""
    folder = tmp_path_factory.mktemp("hostile")
    rows = [{"id": f"{i} {text}", "text": f"{text} row {i}", "label": i % 2, "group": text}
            for i, text in enumerate(HOSTILE * 3)]
    rows[-1]["id"] = 2**60 + 1  # no number of JavaScript
    data = write_rows(folder / "<img src=x onerror=window.hacked=1>.jsonl", rows)
    run = folder / "<b onmouseover=hacked()>run"
    make_run(tiny, run)
    ev.main(["--run", str(run), "--data", str(data), "--out", str(folder / "out"),
             "--draws", "20"])
    return folder / "out" / "report.html", rows


# --- the page as a file ---------------------------------------------------------------------------
def test_eval_writes_it_and_report_writes_it_again(hostile):
    """Fails if eval.py writes none, or if eval.json lacks something that the page needs."""
    path, rows = hostile
    before = path.read_bytes()
    done = run_script("report.py", path.parent)
    assert done.returncode == 0 and str(path) in done.stdout
    assert path.read_bytes() == before
    results = json.loads((path.parent / "eval.json").read_text())
    [(name, about)] = results["runs"].items()
    assert results["data"]["sha256"] == sha256_of(results["data"]["file"])
    assert about["folder"] == name and about["fitted"]["calibration"]["temperature"] == 2.0
    assert results["metrics"][about["scorer"]]["run"] == about["fingerprint"]


def test_hostile_rows_are_texts(hostile):
    """Fails if a text of a row, an id or the name of a file becomes markup, or loses a sign."""
    path, rows = hostile
    page, data = read(path)
    assert page.count("<script") == 2 and page.count("</script") == 2
    assert "<img" not in page and "onload=window" not in page.split('id="data"')[0]
    assert [row["text"] for row in data["rows"]] == [row["text"] for row in rows]
    assert [row["id"] for row in data["rows"]] == [str(row["id"]) for row in rows]


@pytest.mark.parametrize("text", HOSTILE)
def test_markup_escapes(text):
    """Fails if a text or an attribute is not escaped, or if a hidden character stays hidden."""
    element = tag("p", text, title=text, class_="x")
    assert re.fullmatch(r'<p title="[^"<>]*" class="x">[^<>]*</p>', element, re.DOTALL)
    assert not re.search("[\x00-\x08\x0e-\x1f\x7f\u200f\u202a-\u202e\u2066-\u2069]", element)
    assert "<" not in json_text([text]) and json.loads(json_text([text])) == [text]
    assert escaped(Markup("<b>")) == "<b>" and tag("a", "x", id=None) == "<a>x</a>"


def test_nothing_comes_from_elsewhere(tmp_path):
    """Fails if the page needs a network, or if its policy lets one more thing in."""
    page, _ = read(write_report(simulated(tmp_path / "out")))
    links = re.findall(r'(?:href|src|action|data)="([^"]*)"', page)
    assert links and all(link.startswith("#") for link in links)
    assert not re.search(r"url\(|@import|<link|<iframe|<object| on\w+=| style=", page)
    assert set(re.findall(r"https?://[^\s\"'<]+", page)) == {"http://www.w3.org/2000/svg"}
    policy = re.search(r'Content-Security-Policy" content="([^"]*)"', page)[1]
    assert re.fullmatch(r"default-src 'none'; script-src 'sha256-\S{44}'; "
                        r"style-src 'sha256-\S{44}'; base-uri 'none'; form-action 'none'", policy)


@pytest.mark.parametrize("spoil, reason", [
    (lambda data: data.unlink(), "is not there, so this page has no texts"),
    (lambda data: data.write_text(data.read_text() + "\n"), "has changed since the evaluation")])
def test_without_the_data_file(tmp_path, spoil, reason):
    """Fails if the texts of another file are shown next to predictions, or if nothing is said."""
    folder = simulated(tmp_path / "out")
    spoil(folder / "rows.jsonl")
    page, data = read(write_report(folder))
    assert reason in in_words(page)
    assert all(row["text"] is None for row in data["rows"])
    assert data["rows"][0]["predictions"][0]["explanation"] == "It is bad."


def test_ten_thousand_rows_fit(tmp_path):
    """Fails if a page of 10,000 rows of a thousand characters has over 20 MB or leaves some out."""
    path = write_report(simulated(tmp_path / "out", n=10_000, length=1000))
    page, data = read(path)
    assert path.stat().st_size < 20e6 and len(data["rows"]) == 10_000
    assert "too large" not in page and all(row["text"] for row in data["rows"])


@pytest.mark.parametrize("size, drops_rows", [(100_000, False), (20_000, True)])
def test_what_is_left_out_is_said(tmp_path, monkeypatch, size, drops_rows):
    """Fails if a page outgrows its bound, if it drops the worst rows, or if it says nothing."""
    folder = simulated(tmp_path / "out", n=300, length=1000)
    monkeypatch.setattr("plumbing.report_data.LARGEST", size)
    page, data = read(write_report(folder))
    shown = [row for row in data["rows"] if row["text"] is not None]
    bare = [row for row in data["rows"] if row["text"] is None]
    left_out = 300 - len(data["rows"])
    assert len(json_text(data["rows"])) < size + len(data["rows"]) + 2
    assert bare and (left_out > 0) == drops_rows and (len(shown) > 0) == (not drops_rows)
    assert (f"of 300 rows, {len(bare)} have no texts here and {left_out} are left out"
            in in_words(page))
    if shown:
        assert min(row["error"] for row in shown) >= max(row["error"] for row in bare)
    assert data["runs"][0]["positives"] + data["runs"][0]["negatives"] == 300  # the slider has all


def test_the_slider_has_the_counts_of_eval(tmp_path):
    """Fails if p > t decides, if a class is exchanged, or if the run's threshold is rounded."""
    y = np.array([0, 0, 1, 1, 0, 1])
    p = np.array([0.1, 0.25, 0.25, 0.7, 0.7004, 0.9])
    folder = write_evaluation(tmp_path / "out", y, p, ["a"] * 6, [None] * 6, threshold=0.7004)
    _, data = read(write_report(folder))
    [run] = data["runs"]
    assert run["own"] == {"true_positives": [1], "false_positives": [1]}
    assert run["counts"]["true_positives"][0] == run["positives"] == 3
    assert run["counts"]["true_positives"][250] == 3 and run["counts"]["true_positives"][251] == 2
    assert run["counts"]["false_positives"][700] == 1 and run["counts"]["false_positives"][701] == 0
    f1 = json.loads((folder / "eval.json").read_text())["metrics"]["head"]["f1"]
    assert f1 == pytest.approx(2 * 1 / (run["positives"] + 2))


def test_what_to_be_careful_about(tmp_path):
    """Fails if a cut text, a useless score, bad or no calibration, an overlap with training or a
    missing log is silent."""
    folder = simulated(tmp_path / "out", warnings=["class 1 has few rows"])
    results = json.loads((folder / "eval.json").read_text())
    results["metrics"]["head"]["intervals"]["auroc"] = [0.4, 0.7]
    results["metrics"]["head"].update(calibrated=False, ece_floor_q95=0.0)
    [about] = results["runs"].values()
    run = tmp_path / "run"
    run.mkdir()
    (run / "clsgen.json").write_text("{}")
    about.update({"folder": str(run), "fingerprint": sha256_of(run / "clsgen.json")[:12]})
    (folder / "eval.json").write_text(json.dumps(results))
    words = in_words(write_report(folder).read_text())
    for sentence in ("Class 1 has few rows.", "1 of 200 texts were too long", "contains 0.5",
                     "is not calibrated on validation rows", "Do not take it at its word: of the",
                     "the score head, not calibrated; it decides Yes from 0.500 on",
                     "the log of its training is not there"):
        assert sentence in words, sentence
    assert "takes rows as independent" not in words

    results["groups"] = 100
    (folder / "eval.json").write_text(json.dumps(results))
    assert "takes rows as independent" in in_words(write_report(folder).read_text())

    data = folder / "rows.jsonl"  # trained on the test file
    config = {"data": str(data), "data_sha256": sha256_of(data), "valid": "gone"}
    lines = [{"config": config}, {"step": 1, "bce": 0.7, "lm": 3.0}, {"step": 2, "bce": 0.6,
             "lm": None}, {"step": 2, "valid": {"bce": 0.65, "auroc": 0.8, "rep_4": None}}]
    write_rows(run / "log.jsonl", lines)
    page = write_report(folder).read_text()
    words = in_words(page)
    assert "200 of 200 test rows share their text with a training row" in words
    assert "validation file gone is not there as it was" in words
    assert "label loss 0.650, AUROC on validation rows 0.800" in words
    assert "Label loss. runs/x: 0.650 at the last validation" in page

    (run / "clsgen.json").write_text('{"another": "run"}')
    assert "Label loss" not in write_report(folder).read_text()


@pytest.mark.parametrize("rows", [4, 40])
def test_where_p_is_wrong_does_not_depend_on_the_order_of_rows(tmp_path, rows):
    """Fails if rows with the same p are parted, so that a share is that of the first of them, or if
    a page of fewer rows than bins is not written."""
    y = np.repeat([0, 1], rows // 2)
    folder = write_evaluation(tmp_path / "out", y, np.full(rows, 0.5), ["a"] * rows, [None] * rows)
    results = json.loads((folder / "eval.json").read_text())
    results["metrics"]["head"]["ece_floor_q95"] = -1.0
    (folder / "eval.json").write_text(json.dumps(results))
    words = in_words(write_report(folder).read_text())
    assert f"of the {rows} rows around 0.50, the share of Yes is 0.50" in words


def test_groups_are_compared_as_training_reads_them(tmp_path):
    """Fails if blank groups pass for one that training and test share, or if 17 is not 17.0."""
    folder = simulated(tmp_path / "out")
    results = json.loads((folder / "eval.json").read_text())
    [about] = results["runs"].values()
    run = tmp_path / "run"
    run.mkdir()
    (run / "clsgen.json").write_text("{}")
    about.update({"folder": str(run), "fingerprint": sha256_of(run / "clsgen.json")[:12]})

    def careful_about(tested, trained):
        rows = [{"id": f"r{i}", "text": f"row {i}", "label": i % 2, "group": tested}
                for i in range(200)]
        data = write_rows(folder / "rows.jsonl", rows)
        results["data"]["sha256"] = sha256_of(data)
        (folder / "eval.json").write_text(json.dumps(results))
        train = write_rows(tmp_path / "train.jsonl",
                           [{"text": f"other {i}", "label": i, "group": trained} for i in (0, 1)])
        config = {"data": str(train), "data_sha256": sha256_of(train)}
        write_rows(run / "log.jsonl", [{"config": config}])
        return in_words(write_report(folder).read_text())

    assert "share their group" not in careful_about(" ", " ")
    shared = "200 of 200 test rows share their group with a training row"
    assert shared in careful_about(17, 17.0) and shared in careful_about("17", 17)


def test_several_runs_are_told_apart(tmp_path):
    """Fails if a run loses its name in a title, or if colour alone tells two lines apart."""
    page, data = read(write_report(simulated(tmp_path / "out", names=("runs/a", "runs/b"))))
    assert "runs/a: reliability" in page and "runs/b: reliability" in page
    assert [run["name"] for run in data["runs"]] == ["runs/a", "runs/b"]
    assert [len(row["predictions"]) for row in data["rows"]] == [2] * 200
    style = (ROOT / "plumbing" / "report.css").read_text()
    dashes = re.findall(r"^\.series-(\d) \{ stroke: var\(--s\d\);(.*?)\}", style, re.MULTILINE)
    assert len(dashes) == len({dash for _, dash in dashes}) == 8


def test_other_files_are_refused(tmp_path):
    """Fails if a missing or an earlier eval.json, or other predictions, end in a traceback."""
    assert_refused(run_script("report.py", tmp_path), "eval.json")
    folder = simulated(tmp_path / "out")
    predictions = folder / "predictions.jsonl"
    lines = predictions.read_text().splitlines(keepends=True)

    def refused(reason):
        with pytest.raises((ValueError, OSError), match=reason):
            write_report(folder)

    predictions.write_text("".join(lines[:-1]))
    refused("has 199 lines, expected 200")
    predictions.write_text("{}\nno\n")
    refused("predictions.jsonl:2: ")
    predictions.unlink()
    refused("predictions.jsonl")
    (folder / "eval.json").write_text('{"metrics": {}, "n": 200}')
    refused("earlier version .* --overwrite")


@pytest.mark.parametrize("remove", [
    lambda results, about: results.pop("warnings"),
    lambda results, about: results.pop("versions"),
    lambda results, about: about.pop("curves"),
    lambda results, about: about["fitted"].pop("calibration"),
    lambda results, about: results["metrics"]["head"].pop("ece_floor_q95"),
    lambda results, about: results["metrics"]["head"].update(intervals=None),
])
def test_an_earlier_evaluation_is_refused_in_a_sentence(tmp_path, remove):
    """Fails if a page that needs what an earlier version did not write ends in a traceback."""
    folder = simulated(tmp_path / "out")
    results = json.loads((folder / "eval.json").read_text())
    [about] = results["runs"].values()
    remove(results, about)
    (folder / "eval.json").write_text(json.dumps(results))
    with pytest.raises(ValueError, match="earlier version .* --overwrite"):
        main([str(folder)])
    assert not (folder / "report.html").exists()


# --- its parts ------------------------------------------------------------------------------------
@pytest.mark.parametrize("text, explanation, cited", [
    ("The patient has Sepsis.", "Because of sepsis, the risk is high.", ["Sepsis"]),
    ("No heart failure was seen.", "Heart failure raises it.", ["heart failure"]),
    ("It is as it was.", "It is so.", []),
    ("🙂🙂 sepsis 𝒳", "sepsis", ["sepsis"]),
    ("septic", "sepsis", []),
    ("", "sepsis", []),
])
def test_cited_words(text, explanation, cited):
    """Fails if function words count, if case matters, if neighbours are parted, or if an emoji
    shifts the places."""
    places, _ = citations(text, explanation, set())
    units = text.encode("utf-16-le")
    pairs = zip(places[::2], places[1::2], strict=True)
    assert [units[2 * start : 2 * end].decode("utf-16-le") for start, end in pairs] == cited


def test_words_of_most_texts_need_a_neighbour():
    """Fails if "failure" is marked wherever notes have it, or not even in "heart failure"."""
    texts = ["renal failure", "heart failure today"] * FEWEST_TEXTS
    common = common_words(texts)
    assert common == {"failure"} and common_words(texts[:2]) == set()
    assert citations("renal failure", "liver failure", common)[0] == []
    assert citations("heart failure", "a heart failure", common) == ([0, 13], [2, 15])


def test_ticks():
    """Fails if an axis has no round numbers, one too many, or a -0."""
    assert [tick_text(value) for value in ticks(0, 1)] == ["0", "0.2", "0.4", "0.6", "0.8", "1"]
    assert [tick_text(value) for value in ticks(-12, 12)] == ["-10", "-5", "0", "5", "10"]
    assert tick_text(-0.0) == "0"
    for high in (1e-3, 0.7, 1, 3, 49, 10_001):
        assert 3 <= len(ticks(0, high)) <= 7


# --- the page at work -----------------------------------------------------------------------------
needs_browser = pytest.mark.skipif(
    None in PROGRAMS, reason="needs chromium and chromedriver (apt-get install chromium-driver)")

ARROW_RIGHT = "\ue014"
CARDS = "return [...document.querySelectorAll('.card h3')].map(one => one.textContent)"


@pytest.fixture(scope="module")
def browser():
    with Browser() as browser:
        yield browser


def text_of(browser, name):
    return browser.run("return document.getElementById(arguments[0]).textContent", name)


def click(browser, name):
    browser.run("document.getElementById(arguments[0]).click()", name)


def give(browser, name, value, event):
    """Sets a control and says so, as a user's hand would."""
    browser.run("const one = document.getElementById(arguments[0]); one.value = arguments[1];"
                "one.dispatchEvent(new Event(arguments[2]))", name, value, event)


@needs_browser
def test_hostile_rows_do_nothing(hostile, browser):
    """Fails if a row runs as a script, if its text is changed, or if the page has an error."""
    path, rows = hostile
    browser.open(path)
    give(browser, "order", "place", "change")
    assert browser.run("return window.hacked") is None and browser.console() == []
    assert browser.run("return document.scripts.length") == 2
    assert browser.run("return document.querySelectorAll('img, svg[onload], a[href^=java]').length"
                       ) == 0
    shown = browser.run("return [...document.querySelectorAll('.card .text')].map(one =>"
                        "one.textContent)")
    assert rows[1]["text"] in shown and rows[3]["text"] in shown
    assert "abc ⟨U+202E⟩evil⟨U+202C⟩ ⟨U+2066⟩x⟨U+2069⟩ ⟨U+200F⟩ row 8" in shown
    assert "a⟨U+0000⟩b⟨U+0007⟩c⟨U+001B⟩[31md⟨U+007F⟩ row 7" in shown


@needs_browser
def test_its_policy_stops_a_script_that_got_in(hostile, browser):
    """Fails if the Content-Security-Policy is not in force."""
    browser.open(hostile[0])
    browser.run("const made = document.createElement('script'); made.text = 'window.hacked = 2';"
                "document.body.append(made)")
    assert browser.run("return window.hacked") is None
    assert any("Content Security Policy" in line for line in browser.console())


@needs_browser
def test_slider(tmp_path, browser):
    """Fails if the slider's numbers are not those of eval.json at the run's threshold, which is
    between two of its steps, or if it does not move."""
    y = np.array([0, 1, 0, 0, 1, 0, 1])
    p = np.array([0.1, 0.3, 0.4321, 0.4322, 0.4325, 0.7, 0.9])
    folder = write_evaluation(tmp_path / "out", y, p, ["a"] * 7, [None] * 7, threshold=0.4323)
    browser.open(write_report(folder))
    metrics = json.loads((folder / "eval.json").read_text())["metrics"]["head"]
    assert text_of(browser, "slider-value") == "0.432 (the run's own)"
    assert float(text_of(browser, "f1")) == pytest.approx(metrics["f1"], abs=6e-4)
    give(browser, "slider", "0.5", "input")
    assert text_of(browser, "slider-value") == "0.500"
    assert float(text_of(browser, "f1")) == pytest.approx(metrics["f1_half"], abs=6e-4)
    assert float(text_of(browser, "accuracy")) == pytest.approx(metrics["accuracy"], abs=6e-4)
    browser.type("#slider", ARROW_RIGHT * 2)
    assert text_of(browser, "slider-value") == "0.502"
    give(browser, "slider", "1", "input")
    assert text_of(browser, "precision") == "n/a" and text_of(browser, "recall") == "0.000"
    click(browser, "own-threshold")
    assert float(text_of(browser, "f1")) == pytest.approx(metrics["f1"], abs=6e-4)
    assert browser.console() == []


@needs_browser
def test_filters_orders_and_pages(tmp_path, browser):
    """Fails if a filter, an order, the search or the pages show other rows than they say."""
    rng = np.random.default_rng(1)
    p = rng.permutation(np.linspace(0.01, 0.99, 50))
    y = (rng.random(50) < p).astype(int)
    texts = ["It is bad."] * 49 + ["A Needle, and 🙂 sepsis."]
    explanations = [None] * 48 + ["It is good.", "There was sepsis."]
    browser.open(write_report(write_evaluation(tmp_path / "out", y, p, texts, explanations)))
    by_error = [f"r{i}" for i in np.argsort(-np.abs(y - p), kind="stable")]

    # the list begins with the rows that have an explanation
    assert browser.run(CARDS) == [name for name in by_error if name in ("r48", "r49")]
    assert text_of(browser, "count-explained") == "(2)"
    click(browser, "only-explained")
    assert browser.run(CARDS) == by_error[:20]
    click(browser, "next")
    click(browser, "next")
    assert browser.run(CARDS) == by_error[40:]
    assert text_of(browser, "page") == "41 to 50 of 50"
    give(browser, "order", "low", "change")
    assert browser.run(CARDS) == [f"r{i}" for i in np.argsort(p)[:20]]
    give(browser, "order", "place", "change")
    assert browser.run(CARDS) == [f"r{i}" for i in range(20)]

    wrong = [f"r{i}" for i in np.flatnonzero((p >= 0.5) != y)]
    click(browser, "only-wrong")
    assert browser.run(CARDS) == wrong[:20]
    assert text_of(browser, "found") == f"{len(wrong)} of 50 predictions."
    assert text_of(browser, "count-uncertain") == "(10)" and text_of(browser, "count-cut") == "(1)"
    click(browser, "only-wrong")
    disagree = [f"r{i}" for i in (48, 49) if p[i] < 0.5]  # every text says yes
    click(browser, "only-disagree")
    assert browser.run(CARDS) == disagree
    click(browser, "only-disagree")
    give(browser, "search", "needle", "input")
    assert browser.run(CARDS) == ["r49"]
    assert browser.run("return [...document.querySelectorAll('mark')].map(one => one.textContent)"
                       ) == ["sepsis", "sepsis"]
    give(browser, "search", "nothing has this", "input")
    assert browser.run(CARDS) == [] and text_of(browser, "page") == "none"
    assert browser.console() == []


@needs_browser
def test_another_run_can_be_chosen(tmp_path, browser):
    """Fails if slider or list stay with the first run, or if there is a choice of one."""
    folder = simulated(tmp_path / "out", names=("runs/a", "runs/<b>"))
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    records = [json.loads(line) for line in lines]
    for record in records[200:]:  # the second run says yes to everything
        record.update(probability=0.9, label=1, threshold=0.8)
    write_rows(folder / "predictions.jsonl", records)
    browser.open(write_report(folder))
    give(browser, "slider-run", "1", "change")
    assert text_of(browser, "slider-value") == "0.800 (the run's own)"
    assert text_of(browser, "true-negatives") == "0"
    give(browser, "slider-run", "0", "change")
    give(browser, "audit-run", "1", "change")
    negatives = sum(record["true_label"] == 0 for record in records[200:])
    assert text_of(browser, "count-wrong") == f"({negatives})"
    options = "return [...document.querySelectorAll('#audit-run option')].map(one => one.label)"
    assert browser.run(options) == ["runs/a", "runs/<b>"]
    assert browser.console() == []

    browser.open(write_report(simulated(tmp_path / "one")))
    assert browser.run("return document.getElementById('audit-run').checkVisibility()") is False


@needs_browser
def test_a_record_can_be_copied(tmp_path, browser):
    """Fails if a record lacks its run or its calibration."""
    browser.open(write_report(simulated(tmp_path / "out")))
    browser.run("document.querySelector('.card button').click()")
    record = json.loads(browser.run("return document.querySelector('.record').textContent"))
    assert record["run"] == "0123456789ab" and record["base_fingerprint"] == "ffff"
    assert record["calibration"] == {"temperature": 1.5, "bias": 0.25}
    assert record["id"] == browser.run(CARDS)[0] and 0 <= record["probability"] <= 1


@needs_browser
@pytest.mark.parametrize("width", [360, 1280])
@pytest.mark.parametrize("look", ["light", "dark"])
def test_it_fits_a_phone_and_a_dark_room(tmp_path, browser, width, look):
    """Fails if the page is wider than its window, or has a control without a name."""
    path = write_report(simulated(tmp_path / "out", names=("runs/a" * 12, "runs/b")))
    browser.devtools("Emulation.setDeviceMetricsOverride", width=width, height=800,
                     deviceScaleFactor=1, mobile=width < 500)
    browser.devtools("Emulation.setEmulatedMedia",
                     features=[{"name": "prefers-color-scheme", "value": look}])
    browser.open(path)
    assert browser.run("return document.documentElement.scrollWidth") <= width
    named = browser.run("return [...document.querySelectorAll('input, select')].map(one =>"
                        "one.labels.length)")
    assert named and all(named)
    unnamed = "[role=img]:not([aria-label]), svg:not([role]):not([aria-hidden])"
    assert browser.run(f"return document.querySelectorAll('{unnamed}').length") == 0
    paper = browser.run("return getComputedStyle(document.body).backgroundColor")
    assert (paper == "rgb(255, 255, 255)") == (look == "light")
    assert browser.console() == []


def test_in_short(tmp_path):
    """Fails if a count is of the other class, or if texts are compared with the true label."""
    y = np.array([1, 1, 1, 0, 0])
    p = np.array([0.9, 0.8, 0.1, 0.7, 0.2])  # two found, one missed, one wrong
    folder = write_evaluation(tmp_path / "out", np.tile(y, 8), np.tile(p, 8), ["A text."] * 40,
                              ["It is good."] * 40)
    page = write_report(folder).read_text()
    short = page[page.index("<h2>In short"):page.index("<h2>What to be careful about")]
    assert "decides Yes for 24 of 40 rows, 8 of them wrongly" in short
    assert "misses 8 of the 24 rows that are Yes" in short
    assert "16 of its 40 texts do not state what is decided" in short  # every text says yes


def test_predictions_of_another_run_are_refused(tmp_path):
    """Fails if a page shows the numbers of one run and the predictions of another."""
    folder = simulated(tmp_path / "out")
    lines = (folder / "predictions.jsonl").read_text().splitlines()
    records = [json.loads(line) | {"run": "another"} for line in lines]
    write_rows(folder / "predictions.jsonl", records)
    with pytest.raises(ValueError, match="another run than eval.json"):
        write_report(folder)


def test_a_score_that_ranks_the_wrong_way_is_named(tmp_path):
    """Fails if only an interval around chance is a warning."""
    y = np.arange(60) % 2
    p = np.where(y == 1, 0.2, 0.8) + np.linspace(-0.1, 0.1, 60)
    folder = write_evaluation(tmp_path / "out", y, p, ["A text."] * 60, [None] * 60)
    assert "ranks these rows the wrong way" in write_report(folder).read_text()
