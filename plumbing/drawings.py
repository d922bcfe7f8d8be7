"""The pictures of a report as SVG: reliability, ROC, risk and coverage, distribution, training.

Each function takes what `metrics.curves` or a log has, and returns one picture. Colours and dashes
are classes of report.css, so that light, dark and printed pages have one drawing. Several runs in
one picture differ by dashes and by the shape of their marks, too, and not by colour alone.

Notation: x, y are in the units of the data; left and top are in the picture's own units.
"""

import numpy as np

from plumbing.markup import Markup, joined, tag

WIDTH, HEIGHT = 360, 300
LEFT, RIGHT, TOP, BOTTOM = 48, 12, 12, 44  # margins around the axes
SERIES = 8  # so many runs look different; the ninth looks as the first


class Plot:
    """Two axes, and the marks that are added to them: `svg` makes a picture of all."""

    def __init__(self, x_label, y_label, x=(0, 1), y=(0, 1), x_ticks=None, y_ticks=None):
        self.x_range = x
        self.y_range = y
        self.marks = []

        # grid and axes
        bottom = self.top(y[0])
        for value in ticks(*x) if x_ticks is None else x_ticks:
            left = self.left(value)
            self.add("line", class_="grid", x1=left, x2=left, y1=TOP, y2=bottom)
            self.text(left, bottom + 16, tick_text(value), anchor="middle")
        for value in ticks(*y) if y_ticks is None else y_ticks:
            top = self.top(value)
            self.add("line", class_="grid", x1=LEFT, x2=WIDTH - RIGHT, y1=top, y2=top)
            self.text(LEFT - 7, top + 4, tick_text(value), anchor="end")

        # what they are
        center = (LEFT + WIDTH - RIGHT) / 2
        self.text(center, HEIGHT - 6, x_label, anchor="middle", class_="label")
        middle = (TOP + HEIGHT - BOTTOM) / 2
        self.text(0, 0, y_label, anchor="middle", class_="label",
                  transform=f"translate(12 {middle:g}) rotate(-90)")

    def left(self, x):
        """Where a value of x is, from the left edge of the picture."""
        low, high = self.x_range
        return round(LEFT + (x - low) / (high - low) * (WIDTH - LEFT - RIGHT), 1)

    def top(self, y):
        """Where a value of y is, from the top edge of the picture."""
        low, high = self.y_range
        return round(HEIGHT - BOTTOM - (y - low) / (high - low) * (HEIGHT - TOP - BOTTOM), 1)

    def points(self, xs, ys):
        return " ".join(f"{self.left(x)},{self.top(y)}" for x, y in zip(xs, ys, strict=True))

    def add(self, name, *children, **attributes):
        self.marks.append(tag(name, *children, **attributes))

    def text(self, left, top, words, anchor="start", class_="tick", **attributes):
        self.add("text", words, x=left, y=top, text_anchor=anchor, class_=class_, **attributes)

    def line(self, xs, ys, class_):
        self.add("polyline", points=self.points(xs, ys), class_=class_)

    def band(self, xs, low, high):
        outline = f"{self.points(xs, low)} {self.points(xs[::-1], high[::-1])}"
        self.add("polygon", points=outline, class_="band")

    def bar(self, x0, x1, y0, y1, class_):
        left = self.left(x0)
        top = self.top(max(y0, y1))
        width = round(self.left(x1) - left - 1, 1)
        height = round(self.top(min(y0, y1)) - top, 1)
        self.add("rect", x=left, y=top, width=width, height=height, class_=class_)

    def mark(self, x, y, series):
        """The mark of a run at a point: a disc, a square, a triangle or a diamond."""
        self.marks.append(mark(self.left(x), self.top(y), series))

    def svg(self, title, description):
        """The picture, with a title and a description for those who do not see it."""
        return tag("svg", joined(self.marks), viewBox=f"0 0 {WIDTH} {HEIGHT}",
                   width=WIDTH, height=HEIGHT, role="img",
                   aria_label=f"{title}. {description}", xmlns="http://www.w3.org/2000/svg")


def side_by_side(panels, style):
    """Pictures [(name, SVG)] as one SVG that is a file of its own. style: report.css."""
    parts = [tag("style", Markup(style))]
    for i, (name, picture) in enumerate(panels):
        title = tag("text", name, x=LEFT, y=16, class_="label")
        below = tag("g", picture, transform="translate(0 22)")
        parts.append(tag("g", title, below, transform=f"translate({i * WIDTH} 0)"))
    width = len(panels) * WIDTH
    return tag("svg", joined(parts), viewBox=f"0 0 {width} {HEIGHT + 22}", width=width,
               height=HEIGHT + 22, xmlns="http://www.w3.org/2000/svg")


def mark(left, top, series):
    """The mark of a run: its shape says which run it is, and so does its colour."""
    shapes = (
        "M -4.5 0 A 4.5 4.5 0 1 0 4.5 0 A 4.5 4.5 0 1 0 -4.5 0 Z",  # a disc
        "M -4 -4 H 4 V 4 H -4 Z",
        "M 0 -5 L 5 4 H -5 Z",
        "M 0 -5.5 L 5.5 0 L 0 5.5 L -5.5 0 Z",
    )
    return tag("path", d=shapes[series % len(shapes)], transform=f"translate({left:g} {top:g})",
               class_=f"mark series-{series % SERIES}")


def sample(series):
    """The line and the mark of a run, for a legend. The run's name stands next to it."""
    line = tag("line", x1=2, x2=46, y1=8, y2=8, class_=f"curve series-{series % SERIES}")
    return tag("svg", line, mark(24, 8, series), viewBox="0 0 48 16", class_="sample",
               aria_hidden="true")


def ticks(low, high):
    """Round numbers from low to high, at most seven of them."""
    rough = (high - low) / 6
    power = 10.0 ** np.floor(np.log10(rough))
    step = next(power * size for size in (1, 2, 5, 10) if power * size >= rough * 0.999)
    first = np.ceil(low / step - 1e-9)
    last = np.floor(high / step + 1e-9)
    return [float(number * step) for number in np.arange(first, last + 1)]


def tick_text(value):
    """.30000000000000004 as 0.3, and -0.0 as 0."""
    return f"{value + 0.0:.6g}"


# --- is p calibrated? -----------------------------------------------------------------------------
def reliability(name, curves):
    """The observed share of class 1 at each p, with its band, over the histogram of p."""
    curve = curves["reliability"]
    floor = -0.28  # the histogram is below zero
    shares = (0, 0.2, 0.4, 0.6, 0.8, 1)
    plot = Plot("predicted probability", "observed share", y=(floor, 1), y_ticks=shares)
    plot.band(curve["p"], curve["low"], curve["high"])
    plot.line([0, 1], [0, 1], "marked")
    plot.line(curve["p"], curve["observed"], "curve series-0")

    rows = np.add(curves["histogram"]["class_0"], curves["histogram"]["class_1"])
    edges = np.linspace(0, 1, len(rows) + 1)
    for i, height in enumerate(rows / rows.max()):
        if height > 0:
            plot.bar(edges[i], edges[i + 1], floor, floor - 0.6 * floor * height, "bar")
    plot.text(LEFT + 4, plot.top(0) + 12, f"rows; the highest bar is {rows.max()}")

    gap = np.abs(np.subtract(curve["observed"], curve["p"]))
    worst = int(np.argmax(gap))
    return plot.svg(
        f"Reliability of {name}",
        f"Observed share of class 1 against the predicted probability. The curve is farthest from "
        f"the ideal diagonal at {curve['p'][worst]:.2f}, where the observed share is "
        f"{curve['observed'][worst]:.2f}.")


# --- how well does p rank and decide? -------------------------------------------------------------
def roc(runs):
    """All runs in one picture, each with its threshold as a mark: [(name, curves, chosen)].

    chosen: (share of false positives, of true positives) at the run's threshold.
    """
    plot = Plot("false positives, share of class 0", "true positives, share of class 1")
    plot.line([0, 1], [0, 1], "marked")
    described = []
    for series, (name, curves, (false_share, true_share)) in enumerate(runs):
        curve = curves["roc"]
        plot.line(curve["false_positives"], curve["true_positives"],
                  f"curve series-{series % SERIES}")
        plot.mark(false_share, true_share, series)
        described.append(f"{name} at its threshold: {true_share:.0%} of class 1 found, "
                         f"{false_share:.0%} of class 0 wrongly taken for it")
    return plot.svg("ROC", "; ".join(described))


def risk(runs):
    """Wrong decisions among those that are made, if the least certain rows are left undecided.

    runs: [(name, curves)].
    """
    most = 0.1
    shown = []
    described = []
    for name, curves in runs:
        coverage = np.array(curves["risk"]["coverage"])
        wrong = np.array(curves["risk"]["risk"])
        enough = coverage >= 0.05  # the shares of a handful of rows are noise
        shown.append((coverage[enough], wrong[enough]))
        most = max(most, wrong[enough].max(initial=0))
        described.append(f"{name}: {wrong[-1]:.0%} wrong if all rows are decided")

    plot = Plot("share of rows that are decided", "wrong among them", y=(0, 1.1 * most))
    for series, (coverage, wrong) in enumerate(shown):
        plot.line(coverage, wrong, f"curve series-{series % SERIES}")
        if len(coverage):
            plot.mark(coverage[-1], wrong[-1], series)
    return plot.svg("Risk and coverage", "; ".join(described))


def distribution(name, curves, words, threshold):
    """How many rows have which p: class 1 above the line, class 0 below it.

    words: (the word of class 0, that of class 1). threshold: None, or where a line is drawn.
    """
    above = np.array(curves["histogram"]["class_1"])
    below = np.array(curves["histogram"]["class_0"])
    most = max(above.max(), below.max()) * 1.2
    levels = [level for level in ticks(-most, most) if level == int(level)]
    plot = Plot("predicted probability", "rows", y=(-most, most), y_ticks=[])
    for level in levels:
        plot.text(LEFT - 7, plot.top(level) + 4, tick_text(abs(level)), anchor="end")

    edges = np.linspace(0, 1, len(above) + 1)
    for i in range(len(above)):
        plot.bar(edges[i], edges[i + 1], 0, above[i], "bar of-1")
        plot.bar(edges[i], edges[i + 1], 0, -below[i], "bar of-0")
    plot.line([0, 1], [0, 0], "axis")
    plot.text(LEFT + 4, TOP + 12, f"true label {words[1]}", class_="label")
    plot.text(LEFT + 4, HEIGHT - BOTTOM - 6, f"true label {words[0]}", class_="label")
    if threshold is not None:
        plot.line([threshold, threshold], [-most, most], "threshold")
    return plot.svg(
        f"Distribution of the probability of {name}",
        f"{above.sum()} rows of class 1 above the line, {below.sum()} rows of class 0 below it.")


# --- how did the training go? ---------------------------------------------------------------------
def training(title, unit, key, runs):
    """One number of the logs over the steps, for all runs: [(name, lines of its log)].

    A thin line joins the steps, a thick one with marks the validations. None if no log has it at
    two steps or more.
    """
    found = []
    for _, log in runs:
        steps = [(line["step"], line[key]) for line in log if line.get(key) is not None]
        valid = []
        for line in log:
            value = line.get("valid", {}).get(key)
            if value is not None:
                valid.append((line["step"], value))
        found.append((steps, valid))

    lines = [line for pair in found for line in pair]
    if max(map(len, lines), default=0) < 2:  # a point makes no curve
        return None
    points = [point for line in lines for point in line]
    last_step = max(step for step, _ in points)
    highest = max(value for _, value in points)
    top = 1  # if no value is above zero
    if highest > 0:
        top = 1.1 * highest
    plot = Plot("optimizer step", unit, x=(0, max(last_step, 1)), y=(0, top))
    described = []
    for series, ((name, _), (steps, valid)) in enumerate(zip(runs, found, strict=True)):
        style = f"series-{series % SERIES}"
        for line, class_ in ((steps, f"curve steps {style}"), (valid, f"curve {style}")):
            if line:
                xs = [step for step, _ in line]
                ys = [value for _, value in line]
                plot.line(xs, ys, class_)
        if valid:
            described.append(f"{name}: {valid[-1][1]:.3f} at the last validation")
        for step, value in valid:
            plot.mark(step, value, series)
    return plot.svg(title, "; ".join(described))


# --- an interval ----------------------------------------------------------------------------------
def interval(value, limits, scale, marked=None):
    """A number as a dot and its 95 % interval as a line, on a scale (low, high) without words.

    The number itself stands next to it as text. marked: where a dotted line marks the best or the
    useless value.
    """
    low, high = scale

    def left(number):
        clipped = min(max(number, low), high)
        return round(6 + 128 * (clipped - low) / ((high - low) or 1), 1)

    marks = [tag("line", x1=6, x2=134, y1=10, y2=10, class_="grid")]
    if marked is not None:
        x = left(marked)
        marks.append(tag("line", x1=x, x2=x, y1=1, y2=19, class_="marked"))
    if limits is not None:
        marks.append(tag("line", x1=left(limits[0]), x2=left(limits[1]), y1=10, y2=10,
                         class_="whisker"))
    marks.append(mark(left(value), 10, 0))
    return tag("svg", joined(marks), viewBox="0 0 140 20", class_="interval",
               aria_hidden="true")


# --- several systems on several data sets ---------------------------------------------------------
NAMES_WIDTH, PANEL_WIDTH, PANEL_GAP, ROW_HEIGHT = 290, 150, 24, 24


def forest(names, panels, style):
    """Dots with 95 % intervals, a line for each name and a panel for each data set, as a file.

    panels: [(title, {name: (value, low, high)})]; a name may be missing. style: report.css.
    """
    top = 34  # of the first line
    bottom = top + ROW_HEIGHT * len(names)
    marks = [tag("style", Markup(style))]
    for row, name in enumerate(names):
        middle = top + ROW_HEIGHT * (row + 0.5)
        marks.append(tag("text", name, x=NAMES_WIDTH - 12, y=middle + 4, text_anchor="end",
                         class_="tick"))

    for number, (title, found) in enumerate(panels):
        left = NAMES_WIDTH + number * (PANEL_WIDTH + PANEL_GAP)
        lowest = min(low for _, low, _ in found.values())
        highest = max(high for _, _, high in found.values())
        margin = 0.05 * (highest - lowest) or 0.05  # if all are the same
        scale = (lowest - margin, highest + margin)

        def place(value, left=left, scale=scale):
            return round(left + PANEL_WIDTH * (value - scale[0]) / (scale[1] - scale[0]), 1)

        marks.append(tag("text", title, x=left + PANEL_WIDTH / 2, y=18, text_anchor="middle",
                         class_="label"))
        for value in ticks(*scale)[::2]:
            x = place(value)
            marks.append(tag("line", x1=x, x2=x, y1=top, y2=bottom, class_="grid"))
            marks.append(tag("text", tick_text(value), x=x, y=bottom + 16, text_anchor="middle",
                             class_="tick"))
        for row, name in enumerate(names):
            if name in found:
                value, low, high = found[name]
                middle = top + ROW_HEIGHT * (row + 0.5)
                marks.append(tag("line", x1=place(low), x2=place(high), y1=middle, y2=middle,
                                 class_="whisker"))
                marks.append(mark(place(value), middle, 0))

    width = NAMES_WIDTH + len(panels) * (PANEL_WIDTH + PANEL_GAP)
    return tag("svg", joined(marks), viewBox=f"0 0 {width} {bottom + 24}", width=width,
               height=bottom + 24, xmlns="http://www.w3.org/2000/svg")
