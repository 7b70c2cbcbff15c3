"""The report in a browser, opened from disk: what it shows, how it is used, and that nothing leaves the file.

A headless Chromium is driven through its chromedriver; where it is not installed, the tests are skipped.
"""

from __future__ import annotations

import base64
import contextlib
import json
import shutil
import time
from collections.abc import Iterator
from typing import Any

import pytest

from dpo_cli.core import paths
from dpo_cli.report.page import write_report
from tests.report_folder import ATTACK, make_samples, sample_id, write_reports

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
DRIVER = shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None,
    reason="Chromium and its chromedriver are not installed; on Debian: apt-get install chromium chromium-driver",
)

NUM_PROMPTS = 534
SAMPLES = {sample["id"]: sample for sample in make_samples(NUM_PROMPTS, num_tokens=200)}
WIDE, PHONE = (1280, 900), (380, 800)


class Page:
    """The report in a browser."""

    def __init__(self, driver: Any, url: str) -> None:
        self.driver, self.url = driver, url

    def open(self, fragment: str = "") -> None:
        """Load it anew."""
        self.driver.get("about:blank")
        self.driver.get(self.url + fragment)
        deadline = time.monotonic() + 2  # a page without scripts or samples never has one
        while time.monotonic() < deadline and not self.js("return document.querySelector('[aria-selected]') !== null"):
            time.sleep(0.02)

    def go(self, fragment: str) -> None:
        """Follow a link within the page."""
        self.js("location.hash = arguments[0]", fragment)
        self.driver.execute_async_script("setTimeout(arguments[0])")

    def resize(self, size: tuple[int, int]) -> None:
        metrics = {"width": size[0], "height": size[1], "deviceScaleFactor": 1, "mobile": size[0] < 600}
        self.command("Emulation.setDeviceMetricsOverride", **metrics)

    def command(self, name: str, **parameters: Any) -> Any:
        return self.driver.execute_cdp_cmd(name, parameters)

    def js(self, code: str, *arguments: Any) -> Any:
        return self.driver.execute_script(code, *arguments)

    def text(self, selector: str) -> str:
        return self.js("return document.querySelector(arguments[0])?.textContent ?? ''", selector)

    def keys(self, *keys: str) -> None:
        """Press keys where the focus is."""
        for key in keys:
            self.driver.switch_to.active_element.send_keys(key)

    def click(self, selector: str) -> None:
        self.js("document.querySelector(arguments[0]).click()", selector)

    def type(self, text: str) -> None:
        """Search for a text."""
        self.js(
            "const find = document.getElementById('find'); find.value = arguments[0];"
            " find.dispatchEvent(new Event('input', {bubbles: true}))",
            text,
        )

    def sort(self, by: str) -> None:
        self.js(
            "const sort = document.getElementById('sort'); sort.value = arguments[0];"
            " sort.dispatchEvent(new Event('change', {bubbles: true}))",
            by,
        )

    @property
    def listed(self) -> list[str]:
        """Ids in the list."""
        return self.js("return [...document.querySelectorAll('[role=option]')].map(e => e.id.replace('option-', ''))")

    @property
    def selected(self) -> str:
        """The id that is shown."""
        marked = self.js(
            "return [...document.querySelectorAll('[aria-selected=true]')].map(e => e.id.replace('option-', ''))"
        )
        assert len(marked) <= 1
        return marked[0] if marked else ""

    @property
    def count(self) -> str:
        return self.text("#count")

    @property
    def hash(self) -> str:
        return self.js("return location.hash")

    def complaints(self) -> list[str]:
        """What stands in the console."""
        return [entry["message"] for entry in self.driver.get_log("browser")]

    def requests(self) -> set[str]:
        """Every address that was asked for."""
        events = [json.loads(entry["message"])["message"] for entry in self.driver.get_log("performance")]
        return {event["params"]["request"]["url"] for event in events if event["method"] == "Network.requestWillBeSent"}


@pytest.fixture(scope="module")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Page]:
    """A browser with a report of 534 prompts."""
    from selenium import webdriver
    from selenium.webdriver.chrome.options import Options
    from selenium.webdriver.chrome.service import Service

    folder = tmp_path_factory.mktemp("report")
    with contextlib.chdir(folder):
        write_reports(NUM_PROMPTS, num_tokens=200)
        write_report(paths.REPORT_HTML)
    options = Options()
    options.binary_location = CHROMIUM or ""
    for argument in ("--headless=new", "--no-sandbox", "--disable-gpu", "--disable-dev-shm-usage"):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    page = Page(driver, (folder / paths.REPORT_HTML).as_uri())
    try:
        page.resize(WIDE)
        page.open()
        yield page
    finally:
        driver.quit()


@pytest.fixture
def page(opened: Page) -> Iterator[Page]:
    """The page as it is at first; at the end nothing was complained about and no alert is open."""
    opened.js("document.activeElement.blur(); scrollTo(0, 0)")
    opened.go("#sort=id")
    yield opened
    assert opened.complaints() == []
    assert opened.js("return document.title").startswith("DPO report")  # an open alert would be an error here


# --- what it is made of ---------------------------------------------------------------------


def test_nothing_leaves_the_file(page: Page) -> None:
    page.requests()
    page.open()
    page.click("#view-heat")
    asked = {url for url in page.requests() if not url.startswith(("about:", "data:"))}
    assert asked == {page.url}


def test_texts_are_no_markup(page: Page) -> None:
    page.go(f"#prompt={sample_id(0)}")
    assert page.selected == sample_id(0)
    assert page.text("#detail .turn .text") == ATTACK
    for view in ("plain", "diff", "heat"):
        page.click(f"#view-{view}")
        tuned = page.text("#detail .answer.dpo")
        for part in (ATTACK, "<!-- ", "]]> ", "\u2028"):
            assert part in tuned
        assert page.js("return document.querySelectorAll('#samples img, #detail script').length") == 0


def test_no_other_script_may_run(page: Page) -> None:
    page.js(
        "const element = document.createElement('script'); element.append('document.title = 1');"
        " try { document.body.append(element) } catch {}"
    )
    refused = page.complaints()
    assert refused
    assert all("Content Security Policy" in text or "TrustedScript" in text for text in refused)
    page.js("try { document.body.innerHTML = '' } catch {}")
    assert page.text("#headline")
    page.complaints()


def test_it_loads_fast(page: Page) -> None:
    milliseconds = page.js("return performance.getEntriesByType('navigation')[0].domComplete")
    assert milliseconds < 3000
    start = page.js("const start = performance.now(); change('find', 'e'); return performance.now() - start")
    assert start < 1000


# --- filters, order, search -----------------------------------------------------------------


def outcome(sample: dict[str, Any]) -> str:
    win = sample.get("win")
    return "none" if win is None else "win" if win > 0.5 else "loss" if win < 0.5 else "tie"


def test_filters_show_what_they_say(page: Page) -> None:
    assert page.count == "500 of 500 prompts"
    assert "500 of 534 are on this page" in " ".join(page.text("#samples .lead").split())
    everything = page.listed
    assert everything == sorted(everything)
    for name in ("win", "loss", "tie", "none"):
        page.click(f"#only-{name}")
        wanted = [id_ for id_ in everything if outcome(SAMPLES[id_]) == name]
        assert page.listed == wanted
        assert page.count == f"{len(wanted)} of 500 prompts"
        assert page.text(f"#num-{name}") == str(len(wanted))
    page.click("#only-disagreement")
    assert page.listed == [id_ for id_ in everything if SAMPLES[id_].get("consistent") is False]
    assert set(page.listed) == {id_ for id_ in SAMPLES if SAMPLES[id_].get("consistent") is False}


def test_orders_sort_by_what_they_say(page: Page) -> None:
    def difference(sample: dict[str, Any]) -> int:
        return abs(sample["dpo"]["num_tokens"] - sample["sft"]["num_tokens"])

    orders = {
        "kl": lambda sample: -sample["kl"],
        "long": lambda sample: -sample["dpo"]["num_tokens"],
        "length": lambda sample: -difference(sample),
        "win": lambda sample: -sample.get("win", -1),
        "loss": lambda sample: sample.get("win", 2),
    }
    everything = page.listed
    for name, key in orders.items():
        page.sort(name)
        assert page.listed == sorted(everything, key=lambda id_: (key(SAMPLES[id_]), id_)), name


def test_search_reads_all_texts(page: Page) -> None:
    page.type("  questION 42:  ")
    assert page.listed == [sample_id(42)]
    assert page.count == "1 of 500 prompts"
    assert page.selected == sample_id(42)
    assert page.js("return CSS.highlights.get('found').size") == 1
    page.type("很有用的助手")
    assert page.listed == [sample_id(2)]
    page.click("#only-tie")
    assert page.listed == []
    assert page.count == "0 of 500 prompts"
    assert page.js("return getComputedStyle(document.getElementById('empty')).display") != "none"
    page.click("#clear")
    assert page.count == "500 of 500 prompts"


def test_a_link_leads_to_a_sample(page: Page) -> None:
    page.open(f"#prompt={sample_id(20)}&only=loss&sort=kl&find=question&view=heat")
    assert page.selected == sample_id(20)
    assert set(page.listed) <= {id_ for id_ in SAMPLES if outcome(SAMPLES[id_]) == "loss"}
    assert page.js("return document.getElementById('sort').value") == "kl"
    assert page.js("return document.getElementById('find').value") == "question"
    assert len(page.js("return [...document.querySelectorAll('#detail .turn')]")) == 4
    page.keys("d")
    page.keys("j")
    assert f"prompt={page.selected}" in page.hash
    assert "view" not in page.hash
    there = page.hash
    state = (page.selected, page.listed)
    page.open(there)
    assert (page.selected, page.listed) == state
    page.open("#curves")
    assert page.hash == "#curves"
    page.go("#prompt=ffff&only=nonsense")
    assert page.selected == page.listed[0]
    assert "is not on this page, but may be in reports/evaluate/samples.json" in page.count


# --- one sample -----------------------------------------------------------------------------


def test_the_diff_joins_to_both_texts(page: Page) -> None:
    """What is marked is left out of the other text, and what is not marked is the same in both, spaces aside."""
    for number in (2, 3, 10, 30):
        page.go(f"#prompt={sample_id(number)}")
        assert page.selected == sample_id(number)
        sample = SAMPLES[sample_id(number)]
        common = []
        for name in ("sft", "dpo"):
            selector = f"#detail .answer.{name} .text"
            assert page.text(selector) == sample[name]["text"]
            unmarked = page.js(
                "return [...document.querySelector(arguments[0]).childNodes].filter(node => node.nodeType === 3)"
                ".map(node => node.data).join('')",
                selector,
            )
            common.append("".join(unmarked.split()))
        assert common[0] == common[1]
        assert page.js("return document.querySelectorAll('#detail ins').length") > 0
    assert page.js("return document.querySelectorAll('#detail del').length") > 0
    page.keys("d")
    assert page.js("return document.querySelectorAll('#detail ins, #detail del').length") == 0


def test_chinese_is_compared_by_characters(page: Page) -> None:
    page.go(f"#prompt={sample_id(2)}")
    marked = page.js("return [...document.querySelectorAll('#detail ins')].map(element => element.textContent)")
    assert marked == ["很有用的助手", "许多"]


def test_the_heat_has_every_token_and_its_value(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.go(f"#prompt={sample_id(10)}")
    page.keys("t")
    heat = SAMPLES[sample_id(10)]["dpo"]["heat"]
    tokens = page.js("return [...document.querySelectorAll('#detail .t')].map(e => [e.textContent, e.title])")
    signs = [text.replace("\n", "↵\n") for text, _ in heat]
    assert [text for text, _ in tokens] == signs
    for (_, title), (_, ratio) in zip(tokens, heat, strict=True):
        assert float(title.removesuffix(" nats").replace("\N{MINUS SIGN}", "-")) == pytest.approx(ratio, abs=0.00501)
    assert page.js("return document.querySelectorAll('#detail .t[tabindex=\"0\"]').length") == 1
    page.js("document.querySelector('#detail .t').focus()")
    page.keys(Keys.ARROW_RIGHT, Keys.ARROW_RIGHT)
    assert f"token 3 of {len(heat)}" in page.text("#detail output")
    assert page.js("return document.activeElement.title") in page.text("#detail output")
    assert page.js("return getComputedStyle(document.getElementById('legend')).display") != "none"


# --- keys -----------------------------------------------------------------------------------


def test_the_keyboard_is_enough(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    first, second, third = page.listed[:3]
    page.keys("j", "j")
    assert page.selected == third
    page.keys("k")
    assert page.selected == second
    page.keys("k", "k")
    assert page.selected == first
    page.keys("/")
    assert page.js("return document.activeElement.id") == "find"
    page.keys("j", "k", "?")  # letters in a field are letters
    assert page.js("return document.getElementById('find').value") == "jk?"
    assert page.selected == ""
    page.keys(Keys.ESCAPE)
    assert page.js("return document.activeElement.id") == "list"
    assert page.count == "500 of 500 prompts"
    page.keys(Keys.ARROW_DOWN, Keys.ARROW_DOWN)
    assert page.selected == page.listed[2]
    assert page.js("return document.activeElement.getAttribute('aria-activedescendant')") == f"option-{third}"
    page.keys(Keys.END)
    assert page.selected == page.listed[-1]
    page.keys("?")
    assert page.js("return document.getElementById('help').open")
    page.keys("j")
    assert page.selected == page.listed[-1]
    page.keys(Keys.ESCAPE)
    assert not page.js("return document.getElementById('help').open")


def test_every_stop_of_the_tab_key_is_named_and_seen(page: Page) -> None:
    from selenium.webdriver.common.keys import Keys

    page.js("document.getElementById('only-all').focus()")
    seen = []
    for _ in range(8):
        seen.append(
            page.js(
                "const e = document.activeElement, box = e.closest('label') ?? e, style = getComputedStyle(box);"
                " return [e.id, style.outlineStyle !== 'none' || getComputedStyle(e).outlineStyle !== 'none',"
                " Boolean(e.ariaLabel || e.labels?.length || e.textContent.trim())]"
            )
        )
        page.keys(Keys.TAB)
    assert [id_ for id_, _, _ in seen] == ["only-all", "sort", "find", "keys", "list", "after", "view-diff", ""]
    assert all(is_seen and is_named for _, is_seen, is_named in seen)


# --- sizes and media ------------------------------------------------------------------------


@pytest.mark.parametrize("view", ["diff", "heat"])
def test_a_phone_needs_no_sideways_scrolling(page: Page, view: str) -> None:
    page.resize(PHONE)
    page.go(f"#prompt={sample_id(0)}&view={view}")
    widths = page.js(
        "return [document.documentElement.scrollWidth, document.getElementById('detail').getBoundingClientRect().width]"
    )
    page.resize(WIDE)
    assert widths[0] == PHONE[0]
    assert 300 < widths[1] < PHONE[0]


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_can_be_read_in_light_and_dark(page: Page, scheme: str) -> None:
    """Contrast of WCAG AA, 4.5, for all colors that text has on what is behind it."""
    page.command("Emulation.setEmulatedMedia", features=[{"name": "prefers-color-scheme", "value": scheme}])
    pairs = page.js(
        "const style = getComputedStyle(document.documentElement), get = name => style.getPropertyValue(name).trim();"
        " const text = ['--ink', '--muted', '--a', '--b', '--good', '--warn', '--bad'], found = [];"
        " for (const name of text) for (const back of ['--page', '--card']) found.push([name, get(name), get(back)]);"
        " for (const name of ['good', 'warn', 'bad']) found.push([name, get('--' + name), get(`--${name}-wash`)]);"
        " return found"
    )
    page.command("Emulation.setEmulatedMedia", features=[])
    assert len({back for _, _, back in pairs}) > 3
    for name, text, back in pairs:
        assert contrast(text, back) >= 4.5, (name, text, back)


def contrast(one: str, other: str) -> float:
    """The ratio of relative luminances, WCAG 2.2."""

    def luminance(color: str) -> float:
        digits = color.removeprefix("#")
        digits = "".join(2 * digit for digit in digits) if len(digits) == 3 else digits
        parts = [int(digits[place : place + 2], 16) / 255 for place in (0, 2, 4)]
        linear = [part / 12.92 if part <= 0.04045 else ((part + 0.055) / 1.055) ** 2.4 for part in parts]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    dark, light = sorted((luminance(one), luminance(other)))
    return (light + 0.05) / (dark + 0.05)


def test_print_hides_controls_and_nothing_else(page: Page) -> None:
    page.command("Emulation.setEmulatedMedia", media="print")
    hidden = page.js(
        "return [...document.querySelectorAll('body *')].filter(e => getComputedStyle(e).display === 'none'"
        " && (!e.parentElement.closest('[hidden], dialog') && getComputedStyle(e.parentElement).display !== 'none'))"
        ".map(e => e.id || e.className || e.tagName)"
    )
    page.command("Emulation.setEmulatedMedia", media="")
    assert {str(name) for name in hidden} <= {
        "NAV", "filter", "controls", "side", "head", "legend", "empty", "help", "samples-data", "SCRIPT", "NOSCRIPT",
    }  # fmt: skip
    pdf = base64.b64decode(page.command("Page.printToPDF")["data"])
    assert pdf.startswith(b"%PDF")


def test_without_scripts_verdict_and_figures_are_there(page: Page) -> None:
    page.command("Emulation.setScriptExecutionDisabled", value=True)
    try:
        page.open()
        for _ in range(200):  # a slow page must not be still loading when scripts are allowed again
            state = page.command("Runtime.evaluate", expression="document.readyState")["result"]["value"]
            if state == "complete":
                break
            time.sleep(0.05)
    finally:
        page.command("Emulation.setScriptExecutionDisabled", value=False)
    headline, text = page.text("#headline"), " ".join(page.js("return document.body.innerText").split())
    num_figures = page.js("return document.querySelectorAll('figure svg').length")
    browser = page.js("return getComputedStyle(document.getElementById('browser')).display")
    page.open()
    assert headline
    assert num_figures >= 15
    assert browser == "none"
    assert "scripts are off" in text
    assert "scripts are off" not in page.js("return document.body.innerText")
