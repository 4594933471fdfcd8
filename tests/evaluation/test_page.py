"""The report page: complete without a network, readable by any eye and width."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from moon.evaluation.page import best, best_aurc, count, in_order, labels, outcome, render, size
from moon.evaluation.words import ends, points
from moon.scores import SCORE_TABLE
from tests.evaluation.chromium import Chromium, find_chromium
from tests.evaluation.samples import CLASSES, report

CASES = {
    "one": {},
    "three": {"names": ("a", "b", "c")},
    "uncalibrated": {"calibrated": False, "labelled": False, "warnings": ("Take care.",)},
    "only known": {"near": (), "far": ()},
    "only far": {"near": (), "far": ("mnist",)},
    "a missing set": {"missing": ("tin: no /a/long/path/" + "x" * 60,)},
    "unlabelled": {"labelled": False},
    "by class": {"per_class": True},
}


@pytest.fixture(scope="module")
def pages():
    return {name: render(report(n=400, **options)) for name, options in CASES.items()}


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    executable = find_chromium()
    if executable is None:
        pytest.skip("chromium is not installed")
    with Chromium(executable, tmp_path_factory.mktemp("profile")) as opened:
        yield opened


class Strict(HTMLParser):
    VOID = frozenset({"meta", "link", "br", "img", "line", "rect", "polyline", "circle"})

    def __init__(self):
        super().__init__()
        self.open, self.ids, self.addresses = [], [], []

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        self.ids += [given["id"]] if "id" in given else []
        self.addresses += [given[name] for name in ("src", "href") if name in given]
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag in self.VOID:
            return
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()


@pytest.mark.parametrize("case", CASES)
def test_every_case_is_balanced_html_with_unique_ids_and_no_addresses(pages, case):
    parser = Strict()
    parser.feed(pages[case])
    assert parser.open == []
    assert len(parser.ids) == len(set(parser.ids))
    assert all(a.startswith(("data:,", "data:image/png;base64,", "#")) for a in parser.addresses)
    assert {a[1:] for a in parser.addresses if a.startswith("#")} <= set(parser.ids)
    assert not re.search(r"url\(|@import|https?://(?!www\.w3\.org/2000/svg)", pages[case])


def test_the_verdict_comes_first_and_its_figures_stand_out(pages):
    page = pages["one"]
    text = re.sub(r"<[^>]+>", "", page[page.index("<main>") :])
    assert text.index("Accepts ") < text.index("What the gate does")
    assert re.search(r'Accepts <strong class="known-text">[\d.]+%</strong> of known inputs', page)
    assert re.search(r'<strong class="near-text">[\d.]+%</strong> of near', page)


def test_names_from_outside_are_escaped():
    evil = "<script>alert(1)</script>"
    page = render(report(n=200, names=(evil,), far=(evil,), near=(), warnings=(evil,)))
    assert evil not in page
    assert "&lt;script&gt;" in page


def test_bundles_are_told_apart_even_when_alike():
    model = {"name": "m", "version": "sha256:" + "a" * 64}
    other = {"name": "m", "version": "sha256:" + "b" * 64}
    assert labels([model, {**model, "name": "n"}]) == ["m", "n"]
    assert labels([model, other]) == ["m aaaaaaaa", "m bbbbbbbb"]
    assert labels([model, model]) == ["m aaaaaaaa (1)", "m aaaaaaaa (2)"]


def test_the_outcome_names_who_leads():
    def one(name, near, far):
        gate = {"id": {"accept": 0.95}, "near": {"reject": near}, "far": {"reject": far}}
        return {"name": name, "gate": gate}

    assert outcome([one("a", 0.5, 0.9), one("b", 0.6, 0.95)]) == (
        "b catches most: 60.0% of near and 95.0% of far unknown inputs, accepting 95.0% of known."
    )
    assert outcome([one("a", 0.7, 0.9), one("b", 0.6, 0.95)]) == (
        "a catches most near unknown inputs, 70.0% of near; b most far ones, 95.0% of far."
    )
    assert "2 bundles" in outcome([{**one("a", 0, 0), "gate": None}, one("b", 0, 0)])


def test_of_many_scores_the_best_and_the_gates_are_drawn():
    scores = {f"s{i}": {"aurc": 0.1 * i} for i in range(9)}
    assert best_aurc(scores, "s7") == ["s0", "s1", "s2", "s3", "s7"]
    assert best_aurc(scores, None) == ["s0", "s1", "s2", "s3", "s4"]


def test_scores_are_in_order_of_their_areas_after_the_gates():
    def one(near, far):
        return {"near": {"auroc": near} if near else None, "far": {"auroc": far}}

    scores = {"a": one(0.7, 0.7), "b": one(0.9, 0.6), "c": one(0.8, 0.9)}
    assert in_order(scores, "a") == ["a", "c", "b"]
    assert in_order(scores, None) == ["a", "c", "b"]
    assert in_order({name: one(None, s["far"]["auroc"]) for name, s in scores.items()}, "b") == [
        "b", "c", "a",
    ]  # fmt: skip


def many(plain):
    """The report with as many scores as there are, copies of one under other names."""
    for name in SCORE_TABLE:
        for part in (plain["scores"], plain["plots"]["scores"]):
            part.setdefault(name, part["mls"])
    return plain


def test_all_scores_together_can_be_read_at_any_width(browser, tmp_path):
    path = tmp_path / "many.html"
    plain = many(report(n=300, far=("mnist", "svhn", "textures", "places365")))
    path.write_text(render(plain), encoding="utf-8")
    table = "document.querySelector('[aria-label=\"Scores compared, table\"]')"
    for width in (1200, 400):
        browser.open(path, width=width)
        assert browser.evaluate("document.documentElement.scrollWidth - innerWidth") == 0
        assert browser.evaluate(f"{table}.querySelectorAll('tbody tr').length") == len(SCORE_TABLE)
        if width == 1200:
            assert browser.evaluate(f"{table}.scrollWidth - {table}.clientWidth") == 0
        # One score is drawn; the others wait to be opened.
        shown = "[...document.querySelectorAll('details')].filter(d => d.open).length"
        assert browser.evaluate(shown) == 0
        first = f"{table}.querySelector('tbody th')"
        browser.evaluate(f"{table}.scrollLeft = 10000")
        place = f"{first}.getBoundingClientRect().left - {table}.getBoundingClientRect().left"
        assert 0 <= browser.evaluate(place) < 3, "the names stay when the figures scroll"


def test_means_have_their_intervals_and_the_training_set_its_words():
    plain = report(n=400)
    mean = plain["scores"]["ebo"]["near"]
    page = render(plain)
    assert page.count(ends(mean["auroc_ci95"])) >= 3  # tile, table of scores, foot of the set table
    assert ends(plain["gate"]["far"]["reject_ci95"]) in page
    plain["checks"] = {
        "overlaps": [], "training_unchecked": "x<y cannot be opened here",
        "training_sample": None, "nonfinite": {}, "chosen_on": [],
    }  # fmt: skip
    assert "could not be checked: x&lt;y cannot be opened here." in render(plain)


def test_a_gate_by_class_is_not_shown_as_one_threshold():
    one, many = render(report(n=400)), render(report(n=400, per_class=True))
    assert "by one threshold: ebo at least" in one
    assert "The dashed line is the threshold" in one
    for words in ("by one threshold", "the threshold is", "The dashed line is the threshold"):
        assert words not in many
    assert ">threshold</text>" in one
    assert ">threshold</text>" not in many
    assert "the threshold of the class predicted for it, by its ebo" in many
    assert "at most 5% of the known inputs predicted as each class rejected" in many
    assert re.search(r"The promise (holds|is not contradicted)[^<]*10 predicted classes", many)


def test_the_table_of_classes_has_the_threshold_of_each(browser, tmp_path):
    names = (*(f"class {i}" for i in range(CLASSES)), "rare", "rarer")
    plain = report(n=400, classes=names, per_class=True)
    per_class = plain["gate"]["per_class"]
    assert set(per_class["pooled"]) == {"class 3", "rare", "rarer"}
    path = tmp_path / "report.html"
    path.write_text(render(plain), encoding="utf-8")
    browser.open(path)
    table = "document.querySelector('[aria-label=\"By predicted class, table\"] table')"
    cells = f"[...{table}.tBodies[0].rows].map(r => [r.cells[0].textContent, r.cells[5].dataset.v])"
    shown = {name: float(bar) for name, bar in browser.evaluate(cells)}
    assert shown == {name: per_class["classes"][name]["threshold"] for name in names}
    heads = browser.evaluate(f"[...{table}.tHead.rows[0].cells].map(c => c.textContent)")
    assert (heads[5], len(heads)) == ("Threshold", 8)
    browser.evaluate(f"{table}.querySelector('th[data-column=\"7\"] button').click()")
    column = f"[...{table}.tBodies[0].rows].map(r => Number(r.cells[7].dataset.v))"
    sorted_by = browser.evaluate(column)
    assert sorted_by == sorted(sorted_by, reverse=True)
    assert browser.evaluate(f"{table}.querySelectorAll('.ends').length") == 3
    assert browser.evaluate(f"{table}.parentNode.nextElementSibling.textContent").startswith(
        "Shared: one threshold for the 3 classes"
    )
    assert browser.complaints() == []
    assert ">Threshold<" not in render(report(n=400, classes=names))


def test_complete_separation_says_that_its_interval_is_another():
    plain = report(n=400, near=("a",), far=("b",))
    said = "Where a set is told apart completely"
    assert said not in render(plain)
    plain["scores"]["msp"]["far"]["sets"]["b"]["auroc"] = 1.0
    # Under the table of scores, and under that of this score's sets.
    assert render(plain).count(said) == 2
    plain["scores"]["msp"]["far"]["sets"]["b"]["auroc_ci95"] = None
    assert said not in render(plain)


def test_of_re_encoded_images_nothing_is_said_to_be_promised():
    page = render(report(n=400, jpeg=75))
    assert "on images re-encoded as JPEG 75, of which nothing was promised:" in page
    assert "Measured here:" not in page


def test_narrow_intervals_and_near_perfect_rates_keep_a_digit_more():
    assert ends((0.952, 0.987)) == "95.2–98.7"
    assert ends((0.99974, 0.99996)) == "99.97–100.00"
    assert ends((0.997, 1.0)) == "99.7–100.0"
    assert ends(None) == "–"
    assert [points(v, 1) for v in (1, 0.9996, 0.0, 0.0004, 0.95, None)] == [
        "100.0", "99.96", "0.0", "0.04", "95.0", "–"
    ]  # fmt: skip


def test_best_are_those_that_read_the_same():
    scores = {
        name: {"near": None, "far": None, "aurc": aurc}
        for name, aurc in (("msp", 0.000234), ("ebo", 0.000251), ("mls", 0.000244))
    }
    assert best(scores) == {("msp", "", "aurc"), ("mls", "", "aurc")}  # 0.02, 0.03, 0.02


def test_counts_for_people():
    assert [count(v) for v in (None, 12, 1234, 5_480_123, 1.1e12)] == [
        "–", "12", "1.23 k", "5.48 M", "1.1 T"
    ]  # fmt: skip
    assert (size(999), size(1_912_345)) == ("999 B", "1.91 MB")


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize(("dark", "width"), [(False, 1200), (True, 1200), (False, 360)])
def test_a_browser_shows_it_without_complaint_or_request(
    browser, pages, tmp_path, case, dark, width
):
    path = tmp_path / "report.html"
    path.write_text(pages[case], encoding="utf-8")
    browser.open(path, dark=dark, width=width)
    browser.evaluate("document.querySelectorAll('details').forEach(d => d.open = true)")
    assert browser.evaluate("document.querySelector('.verdict').textContent").endswith(".")
    assert browser.evaluate("document.documentElement.scrollWidth - innerWidth") == 0
    drawn = "[...document.images].every(i => i.complete && i.naturalWidth > 0)"
    assert browser.evaluate(drawn)
    # Perceived lightness of paper and ink: the theme really changed.
    light = "getComputedStyle(document.body).backgroundColor.match(/\\d+/g).map(Number)[0]"
    assert (browser.evaluate(light) < 60) is dark
    assert browser.complaints() == []
    assert browser.requests() == [path.as_uri()]


def test_the_browser_would_notice(browser, tmp_path):
    """The check above can fail: a page that logs, throws and asks is caught."""
    path = tmp_path / "bad.html"
    path.write_text(
        "<link rel=icon href='data:,'><img src='http://localhost:9/x.png'>"
        "<script>console.error('logged'); throw new Error('thrown')</script>"
    )
    browser.open(path)
    said = " ".join(browser.complaints())
    assert "logged" in said
    assert "thrown" in said
    assert "http://localhost:9/x.png" in browser.requests()


def test_the_parts_are_there_and_in_order(pages):
    text = re.sub(r"<style>.*?</style>|<script>.*?</script>|<[^>]+>", "", pages["one"], flags=re.S)
    parts = [
        "Accepts ", "The promise", "Telling near unknown", "Corrupted known images: at worst",
        "What the gate does", "Scores compared", "set by set", "How far its answers",
        "By predicted class", "Corrupted inputs", "Mistakes to look at", "Unknown, yet accepted",
        "Known, accepted with a wrong label", "Known and right, yet rejected", "Words and sources",
    ]  # fmt: skip
    places = [text.index(part) for part in parts]
    assert places == sorted(places)
    assert pages["one"].count("data:image/png;base64,") == 8
    assert "Mistakes to look at" not in pages["uncalibrated"]
    assert "By predicted class" not in pages["uncalibrated"]
    legend = pages["uncalibrated"].split('id="corrupted"')[1].split("<details>")[0]
    assert "</svg>rejected" not in legend
    assert "</svg>rejected" in pages["one"]
    missing = pages["a missing set"]
    assert missing.index("Accepts ") < missing.index(
        "1 of the sets of the benchmark cifar10 is not"
    )


def test_of_a_thousand_classes_the_worst_are_shown():
    names = tuple(f"class {i}" for i in range(CLASSES)) + tuple(f"never {i}" for i in range(990))
    page = render(report(n=300, classes=names))
    assert "The 10 of 1000 classes it abstains from most" in page
    assert "never 1" not in page


def test_every_table_can_be_sorted_and_read_without_scripts(browser, pages, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(pages["one"], encoding="utf-8")
    browser.open(path)
    browser.evaluate("document.querySelectorAll('th[data-column] button').forEach(b => b.click())")
    assert browser.complaints() == []
    for label, column in (("Corrupted inputs, table", 3), ("By predicted class, table", 2)):
        table = f"document.querySelector('[aria-label=\"{label}\"] table')"
        header = f"{table}.querySelector('th[data-column=\"{column}\"] button')"
        read = f"[...{table}.tBodies[0].rows].map(r => Number(r.cells[{column}].dataset.v))"
        browser.evaluate(f"{header}.click()")
        values = browser.evaluate(read)
        assert values == sorted(values, reverse=True)
        assert len(set(values)) > 3


def test_without_scripts_nothing_is_missing(browser, pages, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(pages["one"], encoding="utf-8")
    browser.open(path)
    rows = browser.evaluate("document.querySelectorAll('tbody tr').length")
    bare = re.sub(r"<script>.*?</script>", "", pages["one"], flags=re.S)
    assert bare != pages["one"]
    path.write_text(bare, encoding="utf-8")
    browser.open(path)
    assert browser.evaluate("document.querySelectorAll('tbody tr').length") == rows > 30
    assert browser.evaluate("document.querySelectorAll('svg').length") > 8
    assert browser.complaints() == []


def test_tables_sort_by_a_click_and_say_so(browser, pages, tmp_path):
    path = tmp_path / "report.html"
    path.write_text(pages["one"], encoding="utf-8")
    browser.open(path)
    table = "document.querySelectorAll('table')[1]"
    browser.evaluate(f"{table}.querySelector('th[data-column=\"1\"] button').click()")
    read = f"[...{table}.tBodies[0].rows].map(r => Number(r.cells[1].dataset.v))"
    descending = browser.evaluate(read)
    assert descending == sorted(descending, reverse=True)
    assert len(set(descending)) == 4
    state = f"{table}.querySelector('th[data-column=\"1\"]').getAttribute('aria-sort')"
    assert browser.evaluate(state) == "descending"
    browser.evaluate(f"{table}.querySelector('th[data-column=\"1\"] button').click()")
    assert browser.evaluate(read) == sorted(descending)
    assert browser.evaluate(state) == "ascending"


@pytest.mark.parametrize("dark", [False, True])
def test_text_has_enough_contrast(browser, pages, tmp_path, dark):
    path = tmp_path / "report.html"
    path.write_text(pages["one"], encoding="utf-8")
    browser.open(path, dark=dark)
    colours = browser.evaluate(
        "['--ink', '--muted', '--known', '--near', '--far', '--paper', '--panel'].map("
        "n => getComputedStyle(document.documentElement).getPropertyValue(n).trim())"
    )
    *texts, paper, panel = map(luminance, colours)
    for text in texts:
        for ground in (paper, panel):
            high, low = max(text, ground), min(text, ground)
            assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG 2.1 AA


def luminance(colour):
    whole = colour.lstrip("#")
    whole = "".join(c * 2 for c in whole) if len(whole) == 3 else whole
    parts = [int(whole[i : i + 2], 16) / 255 for i in (0, 2, 4)]
    linear = [p / 12.92 if p <= 0.04045 else ((p + 0.055) / 1.055) ** 2.4 for p in parts]
    return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]
