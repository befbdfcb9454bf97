"""Pages: what a browser makes of them, whatever the names in them are."""

from __future__ import annotations

import io
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from fpn_det.report.page import (
    Cell,
    Html,
    Picture,
    Section,
    cards,
    choices,
    code,
    details,
    figure,
    grid,
    markup,
    number,
    page,
    paragraph,
    percent,
    row,
    table,
)

EVIL = [
    "<script>document.title='owned'</script>",
    '"><img src=x onerror="document.title=\'owned\'">',
    "</td></tr></table></script><h1>owned</h1>",
    "مرحبا بالعالم",
    "gpj.\u202etac",
    "\ud800 half",
    "a\0b\x1b[2J",
    "🚲" * 20,
    "x" * 400,
    "&lt;already&gt;",
    "",
]


def image(color: str, size: tuple[int, int] = (300, 200)) -> bytes:
    file = io.BytesIO()
    Image.new("RGB", size, color).save(file, "JPEG")
    return file.getvalue()


def everything() -> list[Section]:
    """Each kind of piece, with hostile text in every place that takes text."""
    names = [f"class {i}" for i in range(12)] + EVIL
    wide = [[name, *(number(i * j, 3) for j in range(30))] for i, name in enumerate(EVIL)]
    return [
        Section(
            "Numbers",
            [
                cards({"AP": "85.2", EVIL[0]: EVIL[1]}, notes={"AP": EVIL[2]}),
                table(
                    ["class", "AP", "gt"],
                    [[name, percent([0.5, -1, 0.25, 0.125][i % 4]), number(i, 0)] for i, name in enumerate(names)],
                    label="classes",
                    filterable=True,
                    marked=[i == 1 for i in range(len(names))],
                ),
                table([*EVIL, *map(str, range(20))], wide, label=EVIL[0]),
            ],
            intro=EVIL[0],
        ),
        Section(
            "Pictures",
            [
                figure(image("red"), alt=EVIL[1], caption=EVIL[0], media="image/jpeg"),
                grid([Picture(image(c), f"{c} {EVIL[0]}", EVIL[1]) for c in ("green", "blue", "white")]),
                row(figure(image("black", (2000, 40)), alt="line", media="image/jpeg"), paragraph(EVIL[8])),
            ],
        ),
        Section(
            EVIL[0],
            [
                choices("Class", {name: paragraph(f"curve of {name}") for name in names}),
                details(EVIL[0], code(EVIL[8]), *EVIL),
                *EVIL,
            ],
        ),
        *(Section(f"Section {i}", [EVIL[i % len(EVIL)]]) for i in range(12)),
    ]


@contextmanager
def opened(browser: Any, path: Path, *, width: int = 1400, scheme: str = "light") -> Iterator[Any]:
    """The page in a browser that says nothing on its console and asks no network."""
    context = browser.new_context(viewport={"width": width, "height": 800}, color_scheme=scheme)
    tab, complaints, requests = context.new_page(), [], []
    tab.on("console", lambda message: complaints.append(message.text))
    tab.on("pageerror", lambda error: complaints.append(str(error)))

    def refuse(route: Any) -> None:
        requests.append(route.request.url)
        route.abort()

    tab.route(lambda url: not url.startswith("file:"), refuse)
    tab.goto(path.as_uri())
    yield tab
    context.close()
    assert (complaints, requests) == ([], [])


@pytest.fixture(scope="module")
def written(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("page") / "page.html"
    path.write_text(page(f"Title {EVIL[0]}", everything(), intro=EVIL[0], footer=EVIL[1]), encoding="utf-8")
    return path


def column(tab: Any, index: int) -> list[str]:
    return tab.locator(f".filtered tbody tr:visible td:nth-child({index})").all_inner_texts()


def test_hostile_text_is_text(browser, written: Path) -> None:
    with opened(browser, written) as tab:
        assert tab.title() == f"Title {EVIL[0]}"
        assert tab.locator("script").count() == 1
        assert tab.locator("h1").count() == 1
        assert tab.locator("img[src=x]").count() == 0
        shown = column(tab, 1)[12:]
    assert shown[:4] == EVIL[:4]
    assert shown[4:7] == [r"gpj.\u202etac", r"\ud800 half", r"a\x00b\x1b[2J"]
    assert shown[7:] == EVIL[7:]


def test_the_policy_stops_what_would_slip_through(browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    smuggled = Html("<script>document.title='owned'</script><img src='https://example.org/x.png'>")
    path.write_text(page("Mine", [Section("a", [smuggled])]), encoding="utf-8")
    tab, refused = browser.new_page(), []
    tab.on("requestfailed", lambda request: refused.append((request.url, request.failure)))
    tab.goto(path.as_uri())
    assert tab.title() == "Mine"
    assert refused == [("https://example.org/x.png", "csp")]
    tab.close()


@pytest.mark.parametrize("width", [390, 1400])
def test_nothing_is_wider_than_the_screen(browser, written: Path, width: int) -> None:
    with opened(browser, written, width=width) as tab:
        assert tab.evaluate("document.documentElement.scrollWidth") <= width
        assert tab.locator(".scroll").nth(1).evaluate("e => e.scrollWidth > e.clientWidth")


def test_long_text_can_be_read_on_a_phone(browser, tmp_path: Path) -> None:
    explained = ["localisation", Cell("0.1", 0.1), Cell("76", 76), "detections of the right class, overlap 0.1 to 0.5"]
    heads = ["error", "cost in AP50", "count", "what it is"]
    path = tmp_path / "page.html"
    path.write_text(page("Mine", [Section("a", [table(heads, [explained], label="errors")])]), encoding="utf-8")
    with opened(browser, path, width=390) as tab:
        assert tab.locator("td").nth(3).bounding_box()["width"] > 200


def test_tables_sort_and_filter(browser, written: Path) -> None:
    with opened(browser, written) as tab:
        header = tab.locator(".filtered thead th")
        header.nth(1).get_by_role("button").click()
        numbers = column(tab, 2)
        assert numbers == sorted(numbers, key=lambda n: float("-inf") if n == "-" else float(n), reverse=True)
        assert header.nth(1).get_attribute("aria-sort") == "descending"
        header.nth(1).get_by_role("button").click()
        assert (column(tab, 2)[0], column(tab, 2)[-1]) == ("12.5", "-")
        header.nth(0).get_by_role("button").click()
        names = column(tab, 1)
        assert names.index("class 2") < names.index("class 10")
        assert header.nth(1).get_attribute("aria-sort") == "none"
        tab.locator("input.filter").fill("SCRIPT")
        assert set(column(tab, 1)) == {EVIL[0], EVIL[2]}
        tab.locator("input.filter").fill("")
        assert len(column(tab, 1)) == 23


def test_pictures_enlarge_and_keys_go_on(browser, written: Path) -> None:
    with opened(browser, written) as tab:
        box = tab.locator("dialog")
        assert not box.is_visible()
        tab.locator(".grid .zoom").nth(0).click()
        assert box.locator("p").inner_text().startswith("2 / 5 green <script>")
        for key, place in (("ArrowRight", 3), ("ArrowLeft", 2), ("ArrowLeft", 1), ("ArrowLeft", 5), ("ArrowRight", 1)):
            tab.keyboard.press(key)
            assert box.locator("p").inner_text().startswith(f"{place} / 5")
        box.get_by_label("Next picture").click()
        assert box.locator("img").get_attribute("src") == tab.locator(".grid img").nth(0).get_attribute("src")
        tab.keyboard.press("Escape")
        assert not box.is_visible()
        tab.locator(".grid .zoom").nth(1).focus()  # by keyboard alone
        tab.keyboard.press("Enter")
        assert box.is_visible()
        box.get_by_text("Close").click()
        assert not box.is_visible()


def test_choices_show_one(browser, written: Path) -> None:
    with opened(browser, written) as tab:
        pieces = tab.locator(".piece")
        assert pieces.nth(0).is_visible()
        tab.locator("select").select_option(index=12)
        visible = [i for i in range(pieces.count()) if pieces.nth(i).is_visible()]
        assert visible == [12]
        assert pieces.nth(12).inner_text() == f"curve of {EVIL[0]}"


def test_numbers() -> None:
    assert (number(None), number(float("nan"))) == (Cell("-", None), Cell("-", None))
    assert number(1234.56) == Cell("1,234.6", 1234.56)
    assert number(2, 0, signed=True).shown == "+2"
    assert (percent(0.1234).shown, percent(-1).shown, percent(-1, signed=True).shown) == ("12.3", "-", "-100.0")
    assert markup(markup("<")) == "&lt;"


def test_empty_tables_are_tables(browser, tmp_path: Path) -> None:
    path = tmp_path / "page.html"
    pieces = [table(["a", "b"], [], label="nothing", filterable=True), grid([]), cards({})]
    path.write_text(page("Empty", [Section("a", pieces)]), encoding="utf-8")
    with opened(browser, path) as tab:
        tab.get_by_role("button", name="a").click()
        assert tab.locator("td").count() == 0
