"""The feature browser in a real headless Chromium: search, sort, open, keyboard, hostile text, widths."""

import shutil
import tempfile
from contextlib import contextmanager

import pytest
from conftest import write_dataset
from test_report import write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = pytest.mark.skipif(
    not (CHROMIUM and DRIVER), reason="no Chromium and chromedriver here (Debian: chromium, chromium-driver)"
)
OWNED = "document.title='owned'"
HOSTILE = f'</script><script>{OWNED}</script><img src=x onerror="{OWNED}">&lt;\''
BACKWARDS = "\u202e"  # what follows would be written from right to left
TEXTS = [
    "import os\nimport sys\n\ndef read(path):\n    return open(path).read()\n",
    "from os import path\n\nclass Reader:\n\tdef read(self):\n\t\tpass\n",
    f"page = {HOSTILE}\nprint(page){BACKWARDS} done\n",
]


@contextmanager
def chromium(width=1600, height=1000, scheme="light"):
    """A fresh headless Chromium with a window of this size (css pixels) that prefers this colour scheme."""
    from selenium import webdriver

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    with tempfile.TemporaryDirectory(ignore_cleanup_errors=True) as profile:
        flags = ("--headless=new", "--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu")
        for flag in (*flags, f"--user-data-dir={profile}"):
            options.add_argument(flag)
        options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
        driver = webdriver.Chrome(options=options, service=webdriver.ChromeService(DRIVER))
        try:
            look_at(driver, width, height, scheme)
            yield driver
        finally:
            driver.quit()


def look_at(browser, width, height, scheme):
    size = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 700}
    browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
    media = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", media)


@pytest.fixture(scope="module")
def page(tmp_path_factory, smollm2):
    """Address of a report: 7 fires on `import`, 12 on `def`, 30 on a hostile token, 270 others on more."""
    from transformers import AutoTokenizer

    from sae.report import page as report

    folder = tmp_path_factory.mktemp("browser")
    tokenizer = AutoTokenizer.from_pretrained(smollm2)
    tokenizer.add_tokens([HOSTILE, BACKWARDS])
    tokenizer.save_pretrained(folder / "tokenizer")
    padded = [text + "\n" + "x = 1\n" * 20 for text in TEXTS]
    ids = [tokenizer(text, add_special_tokens=False)["input_ids"][:32] for text in padded]
    write_dataset(folder / "tokens", ids, [0, 1, 2], folder / "tokenizer", len(tokenizer))

    def firing(word, value):
        """On every token that reads `word`, weaker each time; position 0 is never looked at."""
        contexts = {}
        for row, context in enumerate(ids):
            at = [t for t, id in enumerate(context) if t and tokenizer.decode([id]).strip() == word]
            contexts[row] = {t: value / (1 + n + row) for n, t in enumerate(at)}
        return contexts

    fires = {dim: {0: {dim % 30 + 1: dim / 100}, 1: {}, 2: {}} for dim in range(40, 310)}
    fires |= {7: firing("import", 2.0), 12: firing("def", 4.0), 30: firing(HOSTILE, 8.0)}
    documents = [
        {"dim": 7, "interpretation": "the keyword import", "score": 0.8, "interval": [0.7, 0.9],
         "control": -0.1, "control_dim": 12, "examples": ["«import» os\n"]},
        {"dim": 12, "interpretation": "the keyword def", "score": None, "score_reason": "constant",
         "control": 0.2},
        {"dim": 30, "interpretation": HOSTILE, "score": 0.1, "examples": [f"«{HOSTILE}» {HOSTILE}"]},
        *({"dim": dim, "interpretation": f"thing {dim}", "score": dim / 1000} for dim in range(40, 100)),
    ]  # fmt: skip
    write_run(folder, folder / "tokens", smollm2, dict(sorted(fires.items())), 32, documents)
    text = report.build(folder / "samples.pt", folder / "tokens", autoencoder_path=folder / "7.pt")
    (folder / "report.html").write_text(text)
    return (folder / "report.html").as_uri()


@pytest.fixture(scope="module")
def wide():
    with chromium() as browser:
        yield browser


@pytest.fixture
def browser(wide, page):
    """The report, freshly opened at 1600 px; whatever a test does with it, the console stays empty."""
    wide.get("about:blank")
    wide.get(page)
    yield wide
    assert wide.get_log("browser") == []


def find(browser, selector):
    return browser.find_elements("css selector", selector)


def wait(browser, condition):
    from selenium.webdriver.support.ui import WebDriverWait

    return WebDriverWait(browser, 20, poll_frequency=0.05).until(lambda _: condition())


def texts(browser, selector):
    return browser.execute_script(
        "return [...document.querySelectorAll(arguments[0])].map((node) => node.textContent)", selector
    )


def opened(browser, dim):
    """Wait until the feature's panel is there, contexts included."""
    wait(browser, lambda: texts(browser, "#feature h2") == [f"Feature {dim}"] and find(browser, ".context"))


def keys(browser, *keys):
    from selenium.webdriver.common.action_chains import ActionChains

    ActionChains(browser).send_keys(*keys).perform()


def listed(browser):
    return [int(text) for text in texts(browser, ".row .dim")]


def test_overview_shows_the_run(browser):
    assert texts(browser, ".figure dd") == ["12.3", "0.876", "0.912", "25.0%"]
    assert "model.layers.1.mlp.act_fn" in texts(browser, "#overview")[0]
    assert find(browser, ".chart svg .band") and find(browser, ".chart svg .bars rect")
    assert texts(browser, "#count") == ["273 features"]
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_only_the_rows_in_sight_exist(browser):
    assert 15 < len(find(browser, ".row")) < 60
    assert listed(browser)[:2] == [7, 30], "best score first"
    browser.execute_script("document.getElementById('browse').scrollTop = 1e6")
    wait(browser, lambda: listed(browser)[-1] == 309)
    assert len(find(browser, ".row")) < 60


def test_search_finds_the_feature_of_a_keyword(browser):
    box = find(browser, "#search")[0]
    box.send_keys("import")
    assert listed(browser)[0] == 7
    assert "best match first" in texts(browser, "#count")[0]
    box.clear()
    box.send_keys("thing #9")
    assert listed(browser) == [90, 91, 92, 93, 94, 95, 96, 97, 98, 99]
    box.clear()
    box.send_keys("nosuchthing")
    assert listed(browser) == [] and find(browser, "#none")[0].is_displayed()


def test_sort_both_ways_with_the_undefined_last(browser):
    head = find(browser, "[data-sort=score]")[0]
    head.click()
    assert listed(browser)[:3] == [7, 30, 99]
    assert head.find_element("xpath", "..").get_attribute("aria-sort") == "descending"
    head.click()
    assert listed(browser)[:3] == [40, 41, 42]
    browser.execute_script("document.getElementById('browse').scrollTop = 1e6")
    wait(browser, lambda: listed(browser)[-1] == 309)
    find(browser, "[data-sort=dim]")[0].click()
    browser.execute_script("document.getElementById('browse').scrollTop = 0")
    wait(browser, lambda: listed(browser)[:4] == [7, 12, 30, 40])


def test_a_feature_shows_why_it_was_explained_so(browser):
    from selenium.webdriver.common.action_chains import ActionChains

    find(browser, ".row")[0].click()
    opened(browser, 7)
    assert browser.current_url.endswith("#f7")
    assert texts(browser, ".explanation .says") == ["the keyword import"]
    (facts,) = texts(browser, ".judged .facts")
    assert facts == "score 0.80 (95%: 0.70 to 0.90), control −0.10, from the explanation of #12"
    assert texts(browser, ".explanation mark") == ["import"]
    assert texts(browser, ".tokens .chip") == ["import", "·import"]
    assert texts(browser, ".near a")[0] == "#12"
    assert [title[:6] for title in texts(browser, "#feature h3")] == [
        "Tokens",
        "Neares",
        "Topthe",
        "Spread",
        "Random",
    ]
    # The first `import` of the first context stands at the skipped position 0.
    assert texts(browser, ".top .context pre")[0].startswith(TEXTS[0])
    assert texts(browser, ".top .t.on") == ["import"] and texts(browser, ".t.skipped")[0] == "import"
    assert texts(browser, ".spread .t.on") == [" import"] and texts(browser, ".random .t.on") == []
    assert texts(browser, ".random figcaption") == ["silent"]
    shade = "return getComputedStyle(document.querySelector(arguments[0])).backgroundColor"
    strong, weak = (browser.execute_script(shade, f"{kind} .t.on") for kind in (".top", ".spread"))
    assert strong != weak, "half the activation is half as dark"
    ActionChains(browser).move_to_element(find(browser, ".top .t.on")[0]).perform()
    tip = find(browser, "#tip")[0]
    assert tip.is_displayed() and tip.text == "2.00 import"
    find(browser, ".near a")[0].click()
    opened(browser, 12)
    assert texts(browser, ".judged .facts") == ["No score: constant. Control 0.20"]


def test_white_space_is_shown_and_stays_white_space(browser):
    browser.get(browser.current_url + "#f12")
    opened(browser, 12)
    assert texts(browser, ".spread .context pre")[0].startswith(TEXTS[1])
    marks = browser.execute_script(
        "return ['.nl', '.tab'].map((kind) => "
        "getComputedStyle(document.querySelector(`.spread ${kind}`), '::before').content)"
    )
    assert marks == ['"↵"', '"→"']
    dots = "return getComputedStyle(document.querySelector('.top .sp')).backgroundImage"
    assert "radial-gradient" in browser.execute_script(dots)


def test_keyboard(browser):
    from selenium.webdriver.common.keys import Keys

    keys(browser, "/")
    assert browser.switch_to.active_element.get_attribute("id") == "search"
    keys(browser, "thing #", Keys.ENTER)
    first = listed(browser)[0]
    opened(browser, first)
    keys(browser, Keys.ARROW_DOWN)
    opened(browser, listed(browser)[1])
    assert texts(browser, ".row.current .dim") == [str(listed(browser)[1])]
    for _ in range(30):
        before = texts(browser, "#feature h2")
        keys(browser, Keys.ARROW_DOWN)
        wait(browser, lambda before=before: texts(browser, "#feature h2") != before)
    row, pane = (find(browser, selector)[0].rect for selector in (".row.current", "#browse"))
    assert pane["y"] <= row["y"] and row["y"] + row["height"] <= pane["height"], "it stays in sight"
    (last,) = texts(browser, ".row.current .dim")
    keys(browser, Keys.ARROW_DOWN, Keys.ARROW_UP)
    opened(browser, last)
    keys(browser, Keys.ESCAPE)
    wait(browser, lambda: find(browser, "#overview")[0].is_displayed())
    assert not find(browser, "#feature")[0].is_displayed()
    assert texts(browser, "#count") != ["273 features"]
    keys(browser, "/", Keys.ESCAPE)
    assert texts(browser, "#count") == ["273 features"]


def test_a_link_opens_its_feature(browser):
    address = browser.current_url
    browser.get("about:blank")
    browser.get(address + "#f30")
    opened(browser, 30)
    browser.get(address + "#f9999")
    wait(browser, lambda: find(browser, "#overview")[0].is_displayed())


def test_hostile_text_shows_as_text(browser):
    browser.get(browser.current_url + "#f30")
    opened(browser, 30)
    assert texts(browser, ".explanation .says") == [HOSTILE]
    assert texts(browser, ".example mark") == [HOSTILE]
    assert texts(browser, ".tokens .chip")[0] == HOSTILE.replace(" ", "·")
    (context,) = texts(browser, ".random .context pre")
    assert HOSTILE in context and "\\u{202e}" in context
    assert find(browser, "img") == [] and browser.title == "Feature 30"
    keys(browser, "/", "onerror")
    assert listed(browser) == [30]


@pytest.mark.parametrize("width", [400, 1600])
def test_no_horizontal_scroll_in_light_and_dark(page, width):
    shades = set()
    # A browser of its own: the other tests' keeps its size.
    with chromium() as browser:
        for scheme in ("light", "dark"):
            look_at(browser, width, 800, scheme)
            for place in ("", "#f7", "#f30"):
                browser.get("about:blank")
                browser.get(page + place)
                if place:
                    opened(browser, int(place[2:]))
                measure = "return [document.documentElement.scrollWidth, innerWidth]"
                scroll_width, inner_width = browser.execute_script(measure)
                assert inner_width == width and scroll_width <= width, (place, scheme)
            shades.add(browser.execute_script("return getComputedStyle(document.body).backgroundColor"))
        assert browser.get_log("browser") == []
    assert len(shades) == 2
