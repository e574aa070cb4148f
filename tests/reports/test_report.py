"""Test report.html: no external files, safe with untrusted text, and usable in a browser (skipped if there is none)."""

import base64
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from lora_blip.metrics.bootstrap import Interval
from lora_blip.reports import report
from lora_blip.reports.report import Card
from lora_blip.reports.score_table import ReportRow, scores_html
from lora_blip.runtime.untrusted import printable
from tests.support.browser import show

NASTY = [
    "<script>window.pwned = 1</script>",
    '</script><img src=x onerror="window.pwned = 1">',
    "\"quoted\" & 'single' <!-- data --> &lt; </script x <!-- <script y",
    "قطة حمراء على الطاولة \u202e txt",
    "猫がいる 🐶\u2028\u0000",
    "w" * 2000,
]
METRICS: list[dict[str, Any]] = [
    {"step": 0, "epoch": 0, "val_loss": 2.4, "val_exact_match": 0.0, "val_cider": 0.1},
    *({"step": n, "epoch": n // 10, "loss": 2 / n, "lr": 1e-3 / n, "grad_norm": 1 / n} for n in range(1, 31)),
    {"step": 20, "epoch": 2, "skipped": "vision_model <b> is not finite", "loss_scale": 2.0},
    {"step": 30, "epoch": 3, "val_loss": 0.2, "val_exact_match": 0.9, "val_cider": 7.1},
]
WARNING = "2 images are in the training data <b>"
ROWS = [
    ReportRow("exact match", Interval(0.25, 0.2, 0.3), Interval(0.75, 0.7, 0.8)),
    ReportRow("CIDEr", Interval(0.9, 0.8, 1.0), Interval(0.5, 0.4, 0.85)),
    ReportRow("loss", Interval(2.5, 2.0, 3.0), Interval(0.5, 0.4, 0.6), lower_is_better=True),
    ReportRow("SPICE", None, None, "needs Java <i>"),
]


def picture(path: Path, size: tuple[int, int] = (40, 30), colour: str = "red") -> Path:
    Image.new("RGB", size, colour).save(path)
    return path


def read(path: Path) -> dict[str, Any]:
    """Return the data of a page. It must be strict JSON, without NaN."""
    match = re.search(r'<script type="application/json" id="data">(.*?)</script>', path.read_text("utf-8"), re.DOTALL)
    assert match

    def refuse(word: str) -> None:
        raise AssertionError(f"{word} is not JSON")

    return json.loads(match[1], parse_constant=refuse)


class Tags(HTMLParser):
    """Return every tag of a page with its attributes."""

    def __init__(self, page: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.feed(page)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attrs)))


@pytest.fixture(scope="module")
def page(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a page with six cards of untrusted text, and 114 in two groups, every third wrong and every fourth changed."""
    folder = tmp_path_factory.mktemp("report")
    one, other = picture(folder / "one.png"), picture(folder / "other.jpg", (600, 300), "blue")
    cards = [
        Card(one if n else folder / "gone.png", [text, text[::-1]], text + "!", text, group=text)
        for n, text in enumerate(NASTY)
    ]
    for n in range(114):
        right = f"a red cube number {n}"
        text = right if n % 3 else right.replace("red cube", "blue ball")
        base = text if n % 4 else "a thing"
        group = "even" if n % 2 == 0 else "odd"
        cards.append(
            Card(other, [right], text, base, score=n / 114, base_score=0.5, group=group, leaked="copy" if n == 7 else "")
        )
    facts = {"base <b>": NASTY[0], "adapter": "a/very/long/path_" * 20}
    return report.write(folder / "report.html", NASTY[1], ROWS, cards, METRICS, facts, [WARNING])


def test_a_page_loads_nothing_from_the_network(page: Path) -> None:
    """Tags and styles refer only to data: URLs, and the content security policy forbids all others."""
    text = page.read_text("utf-8")
    tags = Tags(text).tags
    sources = [
        attributes[key] for _, attributes in tags for key in ("src", "href", "srcset", "action", "data") if key in attributes
    ]
    assert sources == ["data:,"]  # the icon, which browsers would ask for
    styles = "".join(re.findall(r"<style>(.*?)</style>", text, re.DOTALL))
    assert styles and "url(" not in styles and "@import" not in styles
    policy = next(attributes["content"] for _, attributes in tags if "http-equiv" in attributes)
    assert policy and policy.startswith("default-src 'none'; img-src data:;")
    assert not re.search(r"\b(innerHTML|outerHTML|insertAdjacentHTML|document\.write|eval|fetch|XMLHttpRequest)\b", text)


def test_untrusted_texts_add_no_tag_to_the_report(page: Path, tmp_path: Path) -> None:
    """The page has the tags of a page with plain words. The JSON contains every caption, with escaped control characters."""
    tags = [tag for tag, _ in Tags(page.read_text("utf-8")).tags]
    assert tags.count("script") == 2 and not {"img", "i"} & set(tags)
    assert tags.count("b") == 9  # the figures of the score table
    assert [card["references"][0] for card in read(page)["cards"] if "score" not in card] == list(map(printable, NASTY))
    odd = report.write(tmp_path / "odd.html", "t", [], [Card(Path("\udcff.png"), ["half \ud83d"], "a")])
    assert read(odd)["cards"][0]["references"] == [r"half \ud83d"]


def test_the_worst_cards_are_first_and_have_the_images(tmp_path: Path) -> None:
    """Cards are sorted by score, then by loss against the base. Those without a score are last. An image is embedded once."""
    images = [picture(tmp_path / f"{n}.png", (300, 600)) for n in range(4)]
    scores = [(0.5, 0.1), (None, None), (0.5, 0.9), (0.0, None), (float("nan"), 1.0), (0.6, 0.5)]
    cards = [Card(images[min(n, 3)], ["a"], str(n), score=score, base_score=base) for n, (score, base) in enumerate(scores)]
    data = read(report.write(tmp_path / "page.html", "t", [], cards, most_pictures=2))
    assert [card["adapted"] for card in data["cards"]] == ["3", "2", "0", "5", "4", "1"]
    assert [card.get("picture") for card in data["cards"]] == [0, 1, None, 0, 0, None]
    assert data["cards"][0]["score"] == 0.0
    for shot in data["pictures"]:
        thumbnail = Image.open(io.BytesIO(base64.b64decode(shot["jpeg"])))
        assert thumbnail.format == "JPEG" and list(thumbnail.size) == shot["size"] == [128, 256]


def test_an_unreadable_image_is_named_on_the_page(tmp_path: Path) -> None:
    """The page names a missing, damaged or unknown file, and shows the other images."""
    (tmp_path / "text.png").write_text("no image")
    complete = picture(tmp_path / "whole.png", (64, 64)).read_bytes()
    (tmp_path / "cut.png").write_bytes(complete[: len(complete) // 2])
    names = ["gone.png", "text.png", "cut.png", "whole.png"]
    data = read(report.write(tmp_path / "page.html", "t", [], [Card(tmp_path / name, [], "a") for name in names]))
    for name, shot in zip(names[:3], data["pictures"], strict=False):
        assert name in shot["problem"]
    assert "jpeg" in data["pictures"][3]
    assert "right" not in data["cards"][0]  # nothing to compare with


def test_a_card_is_right_by_exact_match_unless_right_is_given(tmp_path: Path) -> None:
    gone = tmp_path / "gone.png"
    cards = [Card(gone, ["A cube."], "a cube"), Card(gone, ["two"], "2", right=True), Card(gone, ["a"], "b", "B")]
    shown = read(report.write(tmp_path / "page.html", "t", [], cards))["cards"]
    assert [card["right"] for card in shown] == [True, True, False]
    assert "changed" not in shown[2]  # case is no change


def test_curves_survive_nan_and_long_runs(tmp_path: Path) -> None:
    """The page has every n-th step, the last step, and all validations and skipped steps. NaN becomes null."""
    lines: list[dict[str, Any]] = [{"step": n, "loss": 1.0, "lr": 0.1} for n in range(1, 7002)]
    lines.insert(4, {"step": 4, "val_loss": float("nan")})
    lines.insert(5, {"step": 4, "skipped": "x", "loss_scale": float("inf")})
    data = read(report.write(tmp_path / "page.html", "t", [], [], lines))
    steps = [line["step"] for line in data["metrics"] if "loss" in line]
    assert data["every"] == 4 and steps == [*range(1, 7001, 4), 7001][: len(steps)] and steps[-1] == 7001
    assert {"step": 4, "val_loss": None} in data["metrics"] and {"step": 4, "skipped": "x", "loss_scale": None} in data[
        "metrics"
    ]
    assert read(report.write(tmp_path / "few.html", "t", [], [], lines[:30]))["every"] == 1


def test_the_score_table_shows_which_model_is_better() -> None:
    """The gain is adapted − base, in points or as a number. A lower loss is better. Overlapping intervals and – have a note."""
    table = [re.sub(r"\s+", " ", re.sub(r"<[^>]*>", " ", row)) for row in scores_html(ROWS).split("<tr>")[2:]]
    assert "25.0 % 20.0 to 30.0 75.0 % 70.0 to 80.0 +50.0 points better" in table[0]
    assert "0.900 0.800 to 1.000 0.500 0.400 to 0.850 −0.400 worse, intervals overlap" in table[1]
    assert "−2.000 better" in table[2] and "overlap" not in table[2]
    assert "SPICE needs Java &lt;i&gt; " in table[3] and "–" not in table[3]
    assert '<th scope="row">SPICE</th><td class="note" colspan="4"><small dir="auto">needs Java' in scores_html(ROWS)
    alone = scores_html(
        [ReportRow("exact match", None, Interval(0.5, 0.4, 0.6)), ReportRow("x", None, Interval(float("nan"), 0, 1))]
    )
    assert "base</th>" not in alone and "gain" not in alone and "nan" not in alone


def test_warnings_are_above_the_scores(page: Path) -> None:
    text = page.read_text("utf-8")
    assert 0 < text.index("2 images are in the training data &lt;b&gt;") < text.index(">Scores<") < text.index(">Pictures<")


def test_an_older_page_is_replaced_completely(tmp_path: Path) -> None:
    for title in ("first", "second"):
        path = report.write(tmp_path / "deep" / "page.html", title, [], [])
    assert '<h1 dir="auto">second</h1>' in path.read_text("utf-8")
    assert [file.name for file in path.parent.iterdir()] == ["page.html"]


# ---------------------------------------------------------------- in a browser


@pytest.fixture
def opened(chromium: Any, page: Path) -> Any:
    show(chromium, page, 1280)
    return chromium


def enter(browser: Any, **settings: str | bool) -> str:
    """Set the filters as a user does, and return the number of cards that the page shows."""
    return browser.execute_script(
        """for (const [name, value] of Object.entries(arguments[0])) {
             const control = document.getElementById("filters").elements[name];
             control[typeof value === "boolean" ? "checked" : "value"] = value;
             control.dispatchEvent(new Event("input", {bubbles: true}));
           }
           return document.getElementById("count").textContent""",
        settings,
    )


def shown(browser: Any) -> list[str]:
    return browser.execute_script("return [...document.querySelectorAll('.card dd.adapted')].map(text => text.textContent)")


def test_a_page_opens_from_disk_without_messages(opened: Any, page: Path) -> None:
    """The page writes nothing to the console, loads nothing else, and runs no untrusted script."""
    events = [json.loads(entry["message"])["message"] for entry in opened.get_log("performance")]
    requests = [event["params"] for event in events if event["method"] == "Network.requestWillBeSent"]
    urls = [request["request"]["url"] for request in requests if request["documentURL"] == page.as_uri()]
    assert page.as_uri() in urls and all(url == page.as_uri() or url.startswith("data:") for url in urls)
    assert opened.get_log("browser") == []
    assert opened.execute_script("return window.pwned") is None
    assert opened.title == NASTY[1]


def test_untrusted_texts_are_shown_as_text(opened: Any) -> None:
    assert enter(opened, query="pwned") == "2 of 120 cards"
    assert shown(opened) == [text + "!" for text in NASTY[:2]]
    assert "gone.png does not exist" in opened.find_element("css selector", ".missing").text


def test_filters_count_what_is_left(opened: Any) -> None:
    """Test the filters words, phrase, wrong, changed, leaks and group, alone and together. Clearing them shows all cards."""
    assert opened.find_element("id", "count").text == "120 cards"
    assert len(shown(opened)) == 48  # the rest as one scrolls
    opened.find_element("name", "query").send_keys("CUBE number 11")
    assert opened.find_element("id", "count").text == "5 of 120 cards"  # 11 and 110 to 113
    assert enter(opened, query='"ball number"') == "38 of 120 cards"
    assert enter(opened, group="even") == "19 of 120 cards"
    assert enter(opened, query="", group="", wrong=True) == "44 of 120 cards"
    assert enter(opened, changed=True) == "16 of 120 cards"
    assert enter(opened, wrong=False, changed=False, leaked=True) == "1 of 120 cards"
    assert enter(opened, query="no such words") == "None of 120 cards matches the filters"
    opened.find_element("css selector", "[type=reset]").click()
    assert (
        opened.execute_async_script("setTimeout(() => arguments[0](document.getElementById('count').textContent), 50)")
        == "120 cards"
    )


def test_cards_can_be_sorted(opened: Any) -> None:
    enter(opened, query="number")
    assert shown(opened)[0] == "a blue ball number 0"
    enter(opened, order="best")
    assert shown(opened)[:2] == ["a red cube number 113", "a red cube number 112"]
    enter(opened, order="loss")
    assert shown(opened)[0] == "a blue ball number 0"
    enter(opened, order="gain", query="")
    assert shown(opened)[0] == "a red cube number 113"


def test_differences_are_marked_word_by_word(opened: Any) -> None:
    enter(opened, query='"ball number 3"', order="worst")
    card = opened.find_element("css selector", ".card")
    assert [node.text for node in card.find_elements("tag name", "del")] == ["blue ball"]
    assert [node.text for node in card.find_elements("tag name", "ins")] == ["red cube"]


def test_a_picture_enlarges(opened: Any) -> None:
    """A click or a key opens a card, the arrows change it, and Escape returns the focus."""
    enter(opened, query="number")
    first = opened.find_element("css selector", "button.frame")
    opened.execute_script("arguments[0].focus()", first)
    first.send_keys("\ue007")  # Enter
    viewer = opened.find_element("id", "viewer")
    assert viewer.is_displayed() and "1 of 114" in viewer.text and "number 0" in viewer.text
    opened.switch_to.active_element.send_keys("\ue014")  # →
    assert "2 of 114" in viewer.text and "number 1" in viewer.text
    assert viewer.find_element("tag name", "img").get_attribute("naturalWidth") == "256"
    opened.switch_to.active_element.send_keys("\ue00c")  # Escape
    assert not viewer.is_displayed() and opened.switch_to.active_element == first


def test_curves_can_be_read_by_key(opened: Any) -> None:
    charts = opened.find_elements("css selector", "svg.chart")
    assert [chart.get_attribute("aria-label").split(":")[0] for chart in charts] == [
        "Loss", "Validation", "Validation", "Learning rate", "Gradient norm"
    ]  # fmt: skip
    opened.execute_script("arguments[0].focus()", charts[0])
    charts[0].send_keys("\ue014\ue014")  # → →
    assert opened.find_element("css selector", ".tip").text == "step 1, epoch 0\ntraining 2"


def test_axes_curves_and_scores_have_names(opened: Any) -> None:
    """The score of each card, the order of the cards and each axis have a name. A smoothed curve is above its logged values."""
    texts = opened.execute_script("return [...document.querySelectorAll('.axis-name')].map(text => text.textContent)")
    names = {"loss, log scale", "exact match", "CIDEr", "learning rate", "gradient norm, log scale"}
    assert set(texts) == names | {"optimizer step"} and len(texts) == 2 * len(names)
    (losses,) = (chart for chart in opened.find_elements("css selector", ".curves figure:first-child"))
    assert "training, smoothed" in losses.text and "(thin: each logged step)" in losses.text
    assert len(losses.find_elements("css selector", "path.line.raw")) == 1
    card = opened.find_element("css selector", ".card .marks").text
    assert "score 0.00" in card and "score of the base 0.50" in card
    assert opened.find_element("css selector", "[name=order] option").text == "lowest score first"


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_narrow_screens_need_no_sideways_scroll(chromium: Any, page: Path, scheme: str) -> None:
    """The page fits 360 px. In both colour schemes, every text has a contrast of at least 4.5 (WCAG 2, AA)."""
    show(chromium, page, 360, scheme)
    assert chromium.execute_script("return document.documentElement.scrollWidth") == 360
    assert chromium.execute_script(CONTRAST) == []


CONTRAST = """
const light = part => (part /= 255) <= 0.03928 ? part / 12.92 : ((part + 0.055) / 1.055) ** 2.4;
const channels = color => color.match(/[\\d.]+/g).map(Number);
const luminance = ([r, g, b]) => 0.2126 * light(r) + 0.7152 * light(g) + 0.0722 * light(b);
const behind = node => { const color = channels(getComputedStyle(node).backgroundColor);
  return color[3] === 0 ? behind(node.parentElement) : color; };
return [...document.body.querySelectorAll("*")].filter(node =>
  [...node.childNodes].some(child => child.nodeType === 3 && child.data.trim()) && node.getClientRects().length
  && !["SCRIPT", "NOSCRIPT"].includes(node.tagName)).filter(node => {
    const style = getComputedStyle(node), ink = node.closest("svg") ? style.fill : style.color;
    const [low, high] = [luminance(channels(ink)), luminance(behind(node))].sort((a, b) => a - b);
    return (high + 0.05) / (low + 0.05) < 4.5; }).map(node => node.outerHTML.slice(0, 200))
"""
