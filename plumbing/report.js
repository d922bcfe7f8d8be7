"use strict";
// The two parts of a report that move: the threshold slider and the list of predictions.
// What stands in rows enters the page through textContent alone, so it is never markup.

const data = JSON.parse(document.getElementById("data").textContent);
const byId = (id) => document.getElementById(id);


// --- the threshold slider -------------------------------------------------------------------------
// data.runs[i].counts has a number for each threshold 0, .001, ... 1; `own` has one, at the run's own
function showThreshold(isOwn) {
  const run = data.runs[byId("slider-run").value];
  const threshold = isOwn ? run.threshold : Number(byId("slider").value);
  const counts = isOwn ? run.own : run.counts;
  const at = isOwn ? 0 : Math.round(threshold * 1000);

  const truePositives = counts.true_positives[at];
  const falsePositives = counts.false_positives[at];
  const falseNegatives = run.positives - truePositives;
  const trueNegatives = run.negatives - falsePositives;
  const rows = run.positives + run.negatives;
  const decided = truePositives + falsePositives;
  const [no, yes] = run.words;

  byId("decided-yes").textContent = `decided ${yes}`;
  byId("decided-no").textContent = `decided ${no}`;
  byId("truly-yes").textContent = `truly ${yes}`;
  byId("truly-no").textContent = `truly ${no}`;
  byId("slider").value = threshold;
  byId("slider").setAttribute("aria-valuetext", threshold.toFixed(3));
  byId("slider-value").textContent = threshold.toFixed(3) + (isOwn ? " (the run's own)" : "");
  byId("own-mark").textContent = `▲ ${run.threshold.toFixed(3)}`;
  byId("own-mark").style.left = `${100 * run.threshold}%`;
  byId("true-positives").textContent = truePositives;
  byId("false-positives").textContent = falsePositives;
  byId("false-negatives").textContent = falseNegatives;
  byId("true-negatives").textContent = trueNegatives;
  byId("precision").textContent = share(truePositives, decided);
  byId("recall").textContent = share(truePositives, run.positives);
  byId("specificity").textContent = share(trueNegatives, run.negatives);
  byId("f1").textContent = share(2 * truePositives, run.positives + decided);
  byId("accuracy").textContent = share(truePositives + trueNegatives, rows);
  byId("slider-sentence").textContent =
    `At ${threshold.toFixed(3)}, ${decided} of ${rows} rows are decided ${yes}, ${falsePositives} of them wrongly. ` +
    `${falseNegatives} of the ${run.positives} rows that are ${yes} are missed.`;
}

function share(part, whole) {
  return whole ? (part / whole).toFixed(3) : "n/a";
}


// --- the list of predictions ----------------------------------------------------------------------
const PAGE = 20; // cards
const LONG = 2000; // characters
let firstCard = 0;

const tests = {
  explained: (row, one) => one.explanation !== null,
  wrong: (row, one) => one.decision !== row.label,
  disagree: (row, one) => one.explanation !== null && one.stated !== one.decision,
  uncertain: (row, one) => one.uncertain,
  cut: (row, one) => one.cut > 0,
};

const orders = {
  error: (one, other) => Math.abs(other[0].label - other[1].p) - Math.abs(one[0].label - one[1].p),
  high: (one, other) => other[1].p - one[1].p,
  low: (one, other) => one[1].p - other[1].p,
  place: (one, other) => one[0].place - other[0].place,
};

// The fifth of a run's rows that are nearest to its threshold
data.runs.forEach((run, i) => {
  const distance = (row) => Math.abs(row.predictions[i].p - run.threshold);
  const nearest = [...data.rows].sort((one, other) => distance(one) - distance(other));
  nearest.slice(0, Math.round(nearest.length / 5)).forEach((row) => {
    row.predictions[i].uncertain = true;
  });
});

function showCards() {
  const runNumber = Number(byId("audit-run").value);
  const run = data.runs[runNumber];
  const words = byId("search").value.trim().toLowerCase();
  const pairs = data.rows.map((row) => [row, row.predictions[runNumber]]);

  // the filters, and how many rows each has
  let found = pairs;
  for (const [name, test] of Object.entries(tests)) {
    byId(`count-${name}`).textContent = `(${pairs.filter((pair) => test(...pair)).length})`;
    if (byId(`only-${name}`).checked) {
      found = found.filter((pair) => test(...pair));
    }
  }
  if (words) {
    found = found.filter(([row, one]) =>
      `${row.id}\n${row.text ?? ""}\n${one.explanation ?? ""}`.toLowerCase().includes(words));
  }
  found = [...found].sort(orders[byId("order").value]);

  // one page of them
  firstCard = Math.max(0, Math.min(firstCard, PAGE * Math.floor((found.length - 1) / PAGE)));
  const cards = found.slice(firstCard, firstCard + PAGE).map((pair) => card(run, ...pair));
  byId("cards").replaceChildren(...cards);
  byId("found").textContent = `${found.length} of ${pairs.length} predictions.`;
  byId("page").textContent = found.length
    ? `${firstCard + 1} to ${firstCard + cards.length} of ${found.length}` : "none";
  byId("previous").disabled = firstCard === 0;
  byId("next").disabled = firstCard + PAGE >= found.length;
}

function card(run, row, one) {
  const isWrong = one.decision !== row.label;
  const badges = [isWrong ? badge("✗ wrong", "bad") : badge("✓ right", "good")];
  if (tests.disagree(row, one)) {
    badges.push(badge(one.stated === null ? "≠ text states no label"
      : `≠ text says ${run.words[one.stated]}`, "bad"));
  }
  if (one.cut > 0) {
    badges.push(badge(`✂ ${one.cut} tokens cut from the middle`, ""));
  }

  const facts = [`p ${one.p.toFixed(3)}`, `threshold ${run.threshold.toFixed(3)}`,
    `decision ${run.words[one.decision]}`, `true label ${run.words[row.label]}`];
  if (one.stated !== null) {
    facts.push(`text says ${run.words[one.stated]}`);
  }
  const parts = [
    element("header", "", element("h3", "", visible(row.id)), ...badges),
    bar(run, one),
    element("p", "facts", visible(facts.join(" · "))),
  ];
  if (row.text !== null) {
    parts.push(element("h4", "", "Text"), marked(row.text, one.in_text));
  }
  if (one.explanation === null) {
    parts.push(element("p", "facts", "No explanation was written for this row."));
  } else {
    parts.push(element("h4", "", "Explanation"), marked(one.explanation, one.in_explanation));
  }
  parts.push(copyButton(run, row, one));
  return element("article", "card", ...parts);
}

function element(name, className, ...children) {
  const made = document.createElement(name);
  made.className = className;
  made.append(...children);
  return made;
}

function badge(text, className) {
  return element("span", `badge ${className}`, text);
}

// p as a bar, and where the threshold is
function bar(run, one) {
  const filled = element("i", "");
  filled.style.width = `${100 * one.p}%`;
  const tick = element("b", "");
  tick.style.left = `${100 * run.threshold}%`;
  const made = element("div", "bar-of-p", filled, tick);
  made.setAttribute("role", "img");
  made.setAttribute("aria-label",
    `probability ${one.p.toFixed(3)}, threshold ${run.threshold.toFixed(3)}`);
  return made;
}

// A text with its cited words marked; places are [start, end, start, end, ...]
function marked(text, places) {
  const made = element("p", "text");
  made.dir = "auto";
  let end = 0;
  for (let i = 0; i < places.length; i += 2) {
    made.append(visible(text.slice(end, places[i])),
      element("mark", "", visible(text.slice(places[i], places[i + 1]))));
    end = places[i + 1];
  }
  made.append(visible(text.slice(end)));
  if (text.length > LONG) { // it scrolls, by keyboard too
    made.classList.add("long");
    made.tabIndex = 0;
  }
  return made;
}

// Control characters, and those that turn the direction of a text round, as codes: markup.py has
// the same
function visible(text) {
  const hidden =
    /[\u0000-\u0008\u000b\u000c\u000e-\u001f\u007f-\u009f\u061c\u200e\u200f\u202a-\u202e\u2066-\u2069]/g;
  return text.replace(hidden, (character) =>
    `⟨U+${character.charCodeAt(0).toString(16).toUpperCase().padStart(4, "0")}⟩`);
}

// The record of a prediction as JSON: shown, and copied where the browser lets a page do so
function copyButton(run, row, one) {
  const record = {
    id: row.id, probability: one.p, raw_probability: one.raw, threshold: run.threshold,
    label: one.decision, stated_label: one.stated, true_label: row.label, tokens_cut: one.cut,
    run: run.fingerprint, run_folder: run.name, calibration: run.calibration,
    base: run.base, base_fingerprint: run.base_fingerprint, data: data.file,
  };
  const text = JSON.stringify(record, null, 1);
  const shown = element("pre", "record", visible(text));
  shown.hidden = true;
  shown.tabIndex = 0;
  const said = element("span", "said");
  said.setAttribute("role", "status");
  const button = element("button", "", "Copy as JSON");
  button.type = "button";
  button.addEventListener("click", async () => {
    shown.hidden = false;
    try {
      await navigator.clipboard.writeText(text);
      said.textContent = "copied";
    } catch {
      getSelection().selectAllChildren(shown);
      said.textContent = "selected below: your browser lets no page copy";
    }
  });
  return element("div", "copy", button, said, shown);
}


// --- what the controls do -------------------------------------------------------------------------
function startAgain() {
  firstCard = 0;
  showCards();
}

function turn(pages) {
  firstCard += pages * PAGE;
  showCards();
  byId("found").focus(); // and so to the top of the new page
}

for (const name of ["slider-run", "audit-run"]) {
  byId(name).append(...data.runs.map((run, i) => new Option(visible(run.name), i)));
  byId(name).parentElement.hidden = data.runs.length === 1;
}

byId("slider").addEventListener("input", () => showThreshold(false));
byId("slider-run").addEventListener("change", () => showThreshold(true));
byId("own-threshold").addEventListener("click", () => showThreshold(true));
for (const name of Object.keys(tests)) {
  byId(`only-${name}`).addEventListener("change", startAgain);
}
byId("audit-run").addEventListener("change", startAgain);
byId("order").addEventListener("change", startAgain);
byId("search").addEventListener("input", startAgain);
byId("previous").addEventListener("click", () => turn(-1));
byId("next").addEventListener("click", () => turn(1));

// Where only some rows have an explanation, the list begins with those
byId("only-explained").checked = data.runs.some((run, i) =>
  data.rows.some((row) => row.predictions[i].explanation !== null));

showThreshold(true);
showCards();
