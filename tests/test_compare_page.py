"""The page of a comparison: what is on it, that it is alone and safe, and that it can be read."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import pytest
from browser import CHROMIUM, Browser
from made_logs import HOSTILE, TIMES, damage, make_log

from deft_tvm.cli import main
from deft_tvm.compare import words
from deft_tvm.compare.comparison import Comparison, compare
from deft_tvm.compare.page import page, percent, percents
from deft_tvm.compare.sources import Source
from deft_tvm.timing import Summary

SHIPPED = Path(__file__).parents[1] / "logs"
VOID = {"meta", "br", "wbr"}
STYLES = {
    "grew": "worse",
    "shrank": "better",
    "stayed": "same",
    "broke": "failed",
    "left": "gone",
    "came": "new",
}


@dataclass
class Element:
    """What a parser makes of one, and of all in it."""

    tag: str
    attributes: dict[str, str | None] = field(default_factory=dict)
    inside: list[Element | str] = field(default_factory=list)

    def all(self, tag: str) -> list[Element]:
        return [each for each in self.walk() if each.tag == tag]

    def walk(self) -> Iterator[Element]:
        yield self
        for each in self.inside:
            if isinstance(each, Element):
                yield from each.walk()

    @property
    def text(self) -> str:
        parts = (each if isinstance(each, str) else each.text for each in self.inside)
        return re.sub(r"\s+", " ", "".join(parts))


class _Tree(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.open = [Element("document")]

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        made = Element(tag, dict(attrs))
        assert len(made.attributes) == len(attrs), f"{tag} says an attribute twice"
        self.open[-1].inside.append(made)
        if tag not in VOID:
            self.open.append(made)

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.open[-1].inside.append(Element(tag, dict(attrs)))

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop().tag == tag, f"{tag} ends where another began"

    def handle_data(self, data: str) -> None:
        self.open[-1].inside.append(data)


def parse(html: str) -> Element:
    tree = _Tree()
    tree.feed(html)
    tree.close()
    assert [each.tag for each in tree.open] == ["document"]
    return tree.open[0]


def rows_of(document: Element) -> dict[str, Element]:
    """Of the tables of rows, by kernel."""
    tables = [each for each in document.all("table") if each.attributes["class"] == "rows"]
    bodies = [body for table in tables for body in table.all("tbody")]
    return {body.all("code")[0].text: body for body in bodies}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Source]:
    folder = tmp_path_factory.mktemp("logs")
    label = f"<img src=x onerror=alert(1)>{'x' * 150}"
    a = make_log(folder / "A", "A")
    b = make_log(folder / label, "B", versions={"tvm": "0.28.0"})
    damage(b)
    other = make_log(folder / "other", "B", device="other-device")
    return {name: Source.read(path) for name, path in (("A", a), ("B", b), ("other", other))}


@pytest.fixture(scope="module")
def found(sources) -> Comparison:
    return compare(sources["A"], sources["B"])


@pytest.fixture(scope="module")
def across(sources) -> Comparison:
    return compare(sources["A"], sources["other"])


@pytest.fixture(scope="module")
def document(found) -> Element:
    return parse(page([found]))


def test_every_row_is_there_under_its_verdict(document) -> None:
    styles = {kernel: body.attributes["class"] for kernel, body in rows_of(document).items()}
    assert styles == STYLES
    assert styles.keys() == TIMES.keys()


def test_a_row_says_what_the_comparison_says(found, document) -> None:
    bodies = rows_of(document)
    for row in found.rows:
        text = bodies[row.subject.kernel].text
        wanted = [*row.subject, *words.cells(row)[2:4], *words.cells(row)[6:]]
        if row.ratio is not None:
            wanted += [percent(row.ratio.median), percents(row.ratio), "rows 8 → 16"]
        wanted += [t.command for t in (row.before, row.after) if t]
        wanted += [words.how_it_converged(t) for t in (row.before, row.after) if t]
        assert [each for each in wanted if each not in text] == []


def test_groups_come_in_order_with_how_many_are_in_them(document) -> None:
    headings = [each.text for each in document.all("h3")]
    assert [each for each in headings if each[-1].isdigit()] == [
        "worse 1",
        "better 1",
        "no sure change of 5% or more 1",
        "failed 1",
        "only in A 1",
        "only in B 1",
    ]


def test_the_summary_and_its_notes_are_those_of_all_renderings(found, document) -> None:
    assert found.mean is not None
    for each in (words.summary(found), percent(found.mean.median), *words.notes(found)):
        assert each in document.text
    assert "1 damaged line of B skipped" in document.text


def test_surroundings_that_differ_are_said_loudly_and_before_any_number(document) -> None:
    alarm = next(each for each in document.walk() if each.attributes.get("class") == "alarm")
    assert [each.text.strip() for each in alarm.all("td")] == ["0.27.0", "0.28.0"]
    assert document.text.index("The surroundings differ") < document.text.index("geometric mean")


def test_equal_surroundings_are_no_alarm(sources) -> None:
    same = parse(page([compare(sources["A"], sources["A"])]))
    assert "differ" not in same.all("main")[0].text


def test_headers_tell_both_logs(found, document) -> None:
    tables = [each.text for each in document.all("table") if each.attributes["class"] == "pairs"]
    for source in (found.before, found.after):
        for name, value in words.header(source):
            assert any(name in text and value in text for text in tables), name


def test_searches_are_drawn_for_each_log_that_has_one(document) -> None:
    letters = {
        kernel: [each.attributes["class"] for each in body.all("figure")[0].all("g")]
        for kernel, body in rows_of(document).items()
    }
    both, only_a, only_b = ["A", "B"] * 2, ["A"] * 2, ["B"] * 2
    assert letters == {
        **dict.fromkeys(("grew", "shrank", "stayed"), both),
        **{"broke": only_a, "left": only_a, "came": only_b},
    }


def test_hostile_names_are_text_and_nothing_else(found, document) -> None:
    assert {"script", "img"}.isdisjoint(each.tag for each in document.walk())
    assert not any(name.startswith("on") for each in document.walk() for name in each.attributes)
    assert HOSTILE in rows_of(document)["stayed"].text
    assert found.after.label in document.all("h2")[0].text


def test_nothing_is_fetched(found) -> None:
    html = page([found])
    document = parse(html)
    links = [each.attributes["href"] for each in document.all("a")]
    assert links
    assert all(link.startswith("#") for link in links)
    assert {"link", "script", "img", "iframe", "object", "use"}.isdisjoint(
        each.tag for each in document.walk()
    )
    assert re.search(r"://|@import|url\(|\bsrc=(?!x onerror)", html) is None


def test_links_and_labels_lead_somewhere(found, across) -> None:
    document = parse(page([found, across]))
    ids = Counter(each.attributes["id"] for each in document.walk() if "id" in each.attributes)
    assert set(ids.values()) == {1}
    for each in document.walk():
        for name in ("href", "aria-labelledby"):
            if name in each.attributes:
                assert each.attributes[name].removeprefix("#") in ids


def test_tables_and_headings_mean_what_they_look_like(found, across) -> None:
    document = parse(page([found, across]))
    assert all(each.attributes["scope"] in ("row", "col") for each in document.all("th"))
    assert all(each.all("caption") for each in document.all("table"))
    for table in document.all("table"):
        columns = len(table.all("thead")[0].all("th"))
        for row in (row for body in table.all("tbody") for row in body.all("tr")):
            cells = row.all("th") + row.all("td")
            assert sum(int(each.attributes.get("colspan", "1")) for each in cells) == columns
    levels = [int(each.tag[1]) for each in document.walk() if re.fullmatch("h[1-6]", each.tag)]
    assert levels.count(1) == 1
    assert all(after <= before + 1 for before, after in pairwise(levels))
    named = (each for each in document.all("svg") if each.attributes.get("role") == "img")
    assert all(each.attributes["aria-label"] for each in named)


def test_across_devices_nothing_is_called_faster(across) -> None:
    html = page([across])
    assert re.search("faster|slower|regression", html, re.IGNORECASE) is None
    bodies = rows_of(parse(html))
    assert bodies.keys() == TIMES.keys()
    for row in across.measured:
        assert words.cells(row)[4] in bodies[row.subject.kernel].text
        assert words.cells(row)[8] in bodies[row.subject.kernel].text


def test_several_comparisons_are_on_one_page(found, across) -> None:
    document = parse(page([found, across]))
    (nav,) = document.all("nav")
    assert [each.text for each in nav.all("a")] == [found.after.label, across.after.label]
    assert len(document.all("section")) == 2


def test_thirty_rows_are_half_a_megabyte_at_most(found) -> None:
    assert len(page([replace(found, rows=found.rows * 5)]).encode()) < 500_000


def test_the_command_writes_the_page_and_the_drawing(sources, found, tmp_path) -> None:
    html, drawing = tmp_path / "page.html", tmp_path / "drawing.svg"
    labels = [sources[name].label for name in "AB"]
    with pytest.raises(SystemExit) as ended:
        main(["compare", *labels, "--html", str(html), "--plot", str(drawing)])
    assert ended.value.code == 0
    assert html.read_text(encoding="utf-8") == page([found])
    assert drawing.read_text(encoding="utf-8").startswith("<?xml")


@pytest.mark.parametrize("device", sorted({p.parts[-3] for p in SHIPPED.glob("*/*/trials.jsonl")}))
def test_logs_that_ship_are_shown(device: str) -> None:
    logs = Source.read(SHIPPED / device)
    found = compare(logs, logs)
    document = parse(page([found]))
    assert len(document.all("details")) == 1 + len(found.rows)


@pytest.mark.parametrize(
    ("ratio", "text"), [(1.123, "+12.3 %"), (0.5, "−50.0 %"), (0.9999, "0.0 %"), (3.0, "+200.0 %")]
)
def test_ratios_are_percent_more(ratio, text) -> None:
    assert percent(ratio) == text


def test_an_interval_names_its_unit_once() -> None:
    assert percents(Summary(1.0, 0.98, 1.05)) == "−2.0 … +5.0 %"


# What a reader sees, in a real browser.

TOO_WIDE = """[...document.querySelectorAll("main, main *")].filter(
    each => !each.closest("svg, .unseen, thead") && each.checkVisibility()
        && (each.getBoundingClientRect().right > WIDTH || each.scrollWidth > each.clientWidth + 1)
        && each.clientWidth).map(each => each.outerHTML.slice(0, 200))"""

#: Texts whose colour is too near to that of what is behind them (WCAG 2.2, section 1.4.3).
TOO_FAINT = """(() => {
    const channels = colour => colour.match(/[\\d.]+/g).map(Number);
    const light = colour => channels(colour).slice(0, 3).map(c => c / 255)
        .map(c => c <= 0.04045 ? c / 12.92 : ((c + 0.055) / 1.055) ** 2.4)
        .reduce((sum, c, i) => sum + c * [0.2126, 0.7152, 0.0722][i], 0);
    const behind = element => {
        const colour = getComputedStyle(element).backgroundColor;
        return channels(colour)[3] === 0 ? behind(element.parentElement) : colour;
    };
    const texts = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
    const found = [];
    while (texts.nextNode()) {
        const element = texts.currentNode.parentElement;
        if (!texts.currentNode.data.trim()) continue;
        const style = getComputedStyle(element);
        const own = light(element.closest("svg") ? style.fill : style.color);
        const [low, high] = [own, light(behind(element))].sort((a, b) => a - b);
        if ((high + 0.05) / (low + 0.05) < 4.5) found.push(element.outerHTML.slice(0, 200));
    }
    return found;
})()"""
UNSEEN = '[...document.querySelectorAll(".command")].filter(each => !each.checkVisibility()).length'


@pytest.fixture(scope="module")
def browser(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    if CHROMIUM is None:
        pytest.skip("chromium is not installed")
    browser = Browser(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory, found, across) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page([found, across]), encoding="utf-8")
    return path


@pytest.mark.parametrize(("width", "height"), [(360, 740), (1024, 768), (1280, 900)])
def test_nothing_is_wider_than_the_window(browser, file, width, height) -> None:
    browser.open(file, width, height)
    browser.run('document.querySelectorAll("details").forEach(each => each.open = true)')
    assert browser.run("document.documentElement.scrollWidth") <= width
    assert browser.run(TOO_WIDE.replace("WIDTH", str(width))) == []


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_all_text_stands_out(browser, file, scheme) -> None:
    browser.open(file, 1280, 900, prefers_color_scheme=scheme)
    dark = browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(17, 20, 25)"
    assert dark == (scheme == "dark")
    assert browser.run(TOO_FAINT) == []


def test_the_browser_asks_for_nothing_but_the_page(browser, file) -> None:
    browser.open(file, 1280, 900)
    assert set(browser.requests) == {file.as_uri()}


def test_paper_shows_what_is_folded_on_a_screen(browser, file) -> None:
    browser.open(file, 1280, 900)
    assert browser.run(UNSEEN) > 0
    browser.open(file, 794, 1123, media="print")
    assert browser.run(UNSEEN) == 0
