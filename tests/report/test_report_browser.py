"""The feature browser in a real headless Chromium: search, filters, map, features, keyboard, paper, sight."""

import io
import itertools
import shutil
import tempfile
from contextlib import contextmanager
from pathlib import Path
from urllib.parse import urlparse
from urllib.request import url2pathname

import pytest
from conftest import ROOT, write_dataset
from test_report import write_run

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
AXE = ROOT / ".cache" / "axe" / "node_modules" / "axe-core" / "axe.min.js"  # `make browser` puts it there
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

    def as_list(values):
        return [values.get(t, 0) for t in range(1, 32)]

    fires = {dim: {0: {dim % 30 + 1: dim / 100}, 1: {}, 2: {}} for dim in range(40, 310)}
    fires |= {7: firing("import", 2.0), 12: firing("def", 4.0), 30: firing(HOSTILE, 8.0)}
    looked_at = [["".join(tokenizer.decode([id]) for id in context[1:])] for context in ids]
    contexts = [{"row": row, "text": text, "marks": []} for row, (text,) in enumerate(looked_at)]
    # Right about context 1, blind to context 2, where 7 is silent anyway.
    predicted = [[value / 2 for value in as_list(fires[7][1])], [0.0] * 31]
    candidates = [
        {"interpretation": text, "explained_by": hand, "judged": judged}
        for text, hand, judged in (
            ("words", "lines", None), ("the word import", "counted", 0.84),
            ("the keyword import", "text", 0.81),
        )
    ]  # fmt: skip
    documents = [
        {"dim": 7, "interpretation": "the keyword import", "score": 0.8, "interval": [0.7, 0.9],
         "control": -0.1, "control_dim": 12, "explained_by": "text", "counting": 0.62, "detection": 0.9,
         "fuzzing": None, "fuzzing_reason": "it fires too rarely", "promotes": ["os"],
         "suppresses": ["x", "\\n"], "candidates": candidates,
         "shown": contexts[:1], "scored": contexts[1:], "simulated": predicted},
        {"dim": 12, "interpretation": "the keyword def", "score": None, "score_reason": "constant",
         "control": 0.2},
        {"dim": 30, "interpretation": HOSTILE, "score": 0.1, "examples": [f"«{HOSTILE}» {HOSTILE}"]},
        *({"dim": dim, "interpretation": f"thing {dim}", "score": dim / 1000,
           "explained_by": ("counted", "lines")[dim % 2]} for dim in range(40, 100)),
    ]  # fmt: skip
    write_run(folder, folder / "tokens", smollm2, dict(sorted(fires.items())), 32, documents)
    text = report.build([folder / "samples.pt"], folder / "tokens", None, [folder / "7.pt"])
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
    return [int(text) for text in texts(browser, ".row .dim a")]


def test_overview_shows_the_run(browser):
    assert texts(browser, ".figures dd:not(.note)")[:4] == ["12.3", "0.876", "0.912", "25.0%"]
    # 62 scores, two controls; 7 beats its control and 12 has no score.
    assert texts(browser, ".figures dd:not(.note)")[4:] == ["0.07", "0.05", "0.62", "100%"]
    assert texts(browser, ".legend span:has(.hand)") == [
        "●counted 30",
        "■text 1",
        "▲lines 30",
        "◆explained 2",
    ]
    assert "model.layers.1.mlp.act_fn" in texts(browser, "#overview")[0]
    assert find(browser, ".chart svg .band") and find(browser, ".chart svg .bars rect")
    assert texts(browser, "#count") == ["273 features"]
    assert browser.execute_script("return performance.getEntriesByType('resource').length") == 0


def test_only_the_rows_in_sight_exist(browser):
    assert 15 < len(find(browser, ".row")) < 60
    assert listed(browser)[:2] == [7, 30], "best score first"
    browser.execute_script("document.getElementById('list').scrollTop = 1e6")
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
    browser.execute_script("document.getElementById('list').scrollTop = 1e6")
    wait(browser, lambda: listed(browser)[-1] == 309)
    find(browser, "[data-sort=dim]")[0].click()
    browser.execute_script("document.getElementById('list').scrollTop = 0")
    wait(browser, lambda: listed(browser)[:4] == [7, 12, 30, 40])


def test_a_feature_shows_why_it_was_explained_so(browser):
    from selenium.webdriver.common.action_chains import ActionChains

    find(browser, ".row")[0].click()
    opened(browser, 7)
    assert browser.current_url.endswith("#f7")
    assert texts(browser, ".explanation .says span:last-child") == ["the keyword import"]
    assert texts(browser, ".judged .figure") == [
        "score0.800.70 to 0.90 over contexts", "control−0.10the explanation of #12",
        "counting0.62a table of token counts", "detection0.90AUROC; 0.5 is chance",
        "fuzzing–it fires too rarely",
    ]  # fmt: skip
    assert texts(browser, ".candidates tbody tr") == [
        "■textthe keyword importkept0.81", "●countedthe word import0.84", "▲lineswords–",
    ]  # fmt: skip
    assert texts(browser, ".tokens .chip") == ["import", "·import"]
    assert texts(browser, ".effects .chip") == ["os", "x", "\\n"]
    assert texts(browser, ".near a")[0] == "#12"
    titles = ["Tokens", "Effect", "Neares", "Scored", "Topthe", "Spread", "Random"]
    assert [title[:6] for title in texts(browser, "#feature h3")] == titles
    # The first `import` of the first context stands at the skipped position 0.
    assert texts(browser, ".top .context pre")[0].startswith(TEXTS[0])
    assert texts(browser, ".top .t.on") == ["import"] and texts(browser, ".top .t.skipped") == ["import"]
    assert texts(browser, ".spread .t.on") == [" import"] and texts(browser, ".random .t.on") == []
    assert texts(browser, ".random figcaption") == ["silentscored"]
    shade = "return getComputedStyle(document.querySelector(arguments[0])).backgroundColor"
    strong, weak = (browser.execute_script(shade, f"{kind} .t.on") for kind in (".top", ".spread"))
    assert strong != weak, "half the activation is half as dark"
    (token,), (tip,) = find(browser, ".top .t.on"), find(browser, "#tip")
    # Scrolling hides the tip: first get there, then point.
    browser.execute_script("arguments[0].scrollIntoView({block: 'center'})", token)
    browser.execute_async_script("requestAnimationFrame(() => setTimeout(arguments[0]))")
    ActionChains(browser).move_to_element(token).perform()
    assert tip.is_displayed() and tip.text == "2.00 import"
    find(browser, ".near a")[0].click()
    opened(browser, 12)
    assert texts(browser, ".judged .figure") == ["score–constant", "control0.20another explanation"]


def test_true_and_simulated_activations_stand_token_by_token(browser):
    browser.get(browser.current_url + "#f7")
    opened(browser, 7)
    assert texts(browser, ".shown summary") == ["Shown: the 1 contexts that the explanation was made from"]
    assert texts(browser, ".shown .tag") == ["shown"] and len(find(browser, ".strips")) == 2
    assert texts(browser, ".spread .tag") == ["scored"] and texts(browser, ".top .tag") == ["shown"]
    first, second = find(browser, ".strips")
    (token,) = first.find_elements("css selector", ".t.on")
    assert token.text.strip() == "import" and token.get_attribute("data-predicted") == "1.00"
    read = "return ['--a', '--s'].map((name) => arguments[0].style.getPropertyValue(name))"
    assert browser.execute_script(read, token) == ["0.502", "1.000"], "128 and 255 of 255"
    assert second.find_elements("css selector", ".t.on, .t[style]") == []
    # Position 0 is not looked at: faint, and without a prediction.
    (skipped,) = first.find_elements("css selector", ".t.skipped")
    assert skipped.get_attribute("data-predicted") is None
    height = "const s = getComputedStyle(arguments[0]); return s.backgroundSize"
    assert browser.execute_script(height, token).split(", ")[:2] == ["100% 5.522px", "100% 10px"]


def test_filters_by_score_hand_and_frequency(browser):
    def fill(id, value):
        box = find(browser, f"#{id}")[0]
        box.clear()
        box.send_keys(str(value))

    fill("score_from", 0.095)
    assert listed(browser) == [7, 30, 99, 98, 97, 96, 95]
    assert texts(browser, "#count") == ["7 of 273 features"]
    fill("score_to", 0.1)
    assert listed(browser) == [30, 99, 98, 97, 96, 95]
    choose(browser, "hand", "▲ lines")
    assert listed(browser) == [99, 97, 95]
    find(browser, "#reset")[0].click()
    assert texts(browser, "#count") == ["273 features"]
    choose(browser, "hand", "not explained")
    assert texts(browser, "#count") == ["210 of 273 features"]
    find(browser, "#reset")[0].click()
    fill("fires_from", 4)
    assert listed(browser) == [] and find(browser, "#none")[0].is_displayed()
    # What is no filter here is not offered.
    assert not find(browser, "#layer_type")[0].is_displayed() and not find(browser, "#run")[0].is_displayed()


def test_the_map_selects(browser):
    from selenium.webdriver.common.action_chains import ActionChains

    wait(browser, lambda: len(find(browser, "#map .points")) == 6)
    x, y = browser.execute_script("return scale.at(byId.get('f7'))")
    map_, actions = find(browser, "#map")[0], ActionChains(browser)
    left, top = x - map_.rect["width"] / 2, y - map_.rect["height"] / 2
    actions.move_to_element_with_offset(map_, int(left), int(top)).perform()
    assert find(browser, "#tip")[0].text.startswith("7  0.80 the keyword import")
    ActionChains(browser).click().perform()
    opened(browser, 7)
    here = find(browser, "#map .here")[0]
    assert [float(here.get_attribute(name)) for name in ("cx", "cy")] == [x, y]
    ActionChains(browser).move_by_offset(-30, -20).click_and_hold().move_by_offset(60, 40).release().perform()
    assert listed(browser) == [7] and texts(browser, "#count") == ["1 of 273 features"]
    assert 0.5 < float(find(browser, "#score_from")[0].get_property("value")) < 0.8
    wait(browser, lambda: float(find(browser, "#map .brush")[0].get_attribute("width")) > 30)
    # A click beside the points takes the selection back.
    ActionChains(browser).move_to_element_with_offset(map_, 0, int(top)).click().perform()
    assert texts(browser, "#count") == ["273 features"]


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
    row, pane = (find(browser, selector)[0].rect for selector in (".row.current", "#list"))
    assert pane["y"] <= row["y"] and row["y"] + row["height"] <= pane["y"] + pane["height"] + 1, (
        "it stays in sight"
    )
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
    assert texts(browser, ".explanation .says span:last-child") == [HOSTILE]
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


def choose(browser, id, text):
    from selenium.webdriver.support.ui import Select

    Select(find(browser, f"#{id}")[0]).select_by_visible_text(text)


@pytest.fixture(scope="module")
def two_runs(page, tmp_path_factory, smollm2):
    """Address of a page of two layers: the page's run, and one at layer 20 whose feature 7 is another."""
    import torch

    from sae.report import page as report

    first = Path(url2pathname(urlparse(page).path)).parent
    second = tmp_path_factory.mktemp("second")
    write_run(
        second, first / "tokens", smollm2, {7: {2: {3: 1.0}}, 9: {}}, 32, [{"dim": 9, "interpretation": "z"}]
    )
    content = torch.load(second / "samples.pt", weights_only=True)
    content["config"] |= {
        "layer_id": 20,
        "layer_type": "attn_sublayer",
        "hookpoint": "model.layers.20.self_attn",
    }
    torch.save(content, second / "samples.pt")
    (second / "samples.explanations.jsonl").unlink()
    files = [folder / "samples.pt" for folder in (first, second)]
    (second / "report.html").write_text(report.build(files, first / "tokens"))
    return (second / "report.html").as_uri()


def test_two_layers_in_one_page(wide, two_runs):
    wide.get("about:blank")
    wide.get(two_runs)
    assert texts(wide, "#count") == ["275 features"]
    assert texts(wide, ".runs tbody th") == ["layer 1, mlp_activations", "layer 20, attn_sublayer"]
    assert texts(wide, ".runs tbody td:nth-child(7)") == ["63", "0"]
    choose(wide, "run", "layer 20, attn_sublayer")
    assert texts(wide, "#count") == ["2 of 275 features"]
    find(wide, "#reset")[0].click()
    choose(wide, "layer_type", "attn_sublayer")
    assert listed(wide)[:2] == [7, 9] and "layer 20" in texts(wide, ".row .dim small")[0]
    find(wide, ".row")[0].click()
    opened(wide, 7)
    assert wide.current_url.endswith("#r1f7") and "layer 20" in texts(wide, "#feature header p")[0]
    assert texts(wide, ".top .t.on") != ["import"], "the contexts are its own run's"
    wide.execute_script("location.hash = '#f7'")
    wait(wide, lambda: texts(wide, ".explanation .says span:last-child") == ["the keyword import"])
    assert wide.get_log("browser") == []


def test_paper_shows_the_feature_or_the_list(page):
    with chromium() as browser:
        browser.get(page + "#f7")
        opened(browser, 7)
        browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"media": "print"})
        assert (
            not find(browser, "#browse")[0].is_displayed()
            and not find(browser, "#feature nav")[0].is_displayed()
        )
        assert browser.execute_script("return getComputedStyle(document.body).overflowY") == "visible"
        shade = "return getComputedStyle(document.querySelector('.top .t.on')).printColorAdjust"
        assert browser.execute_script(shade) == "exact"
        browser.execute_script("location.hash = ''; dispatchEvent(new Event('beforeprint'))")
        wait(browser, lambda: len(find(browser, ".row")) == 273)
        assert find(browser, "#overview")[0].is_displayed() and not find(browser, "#bar")[0].is_displayed()
        browser.execute_script("dispatchEvent(new Event('afterprint'))")
        assert len(find(browser, ".row")) < 273


def lab(rgb):
    """sRGB 0..255 as CIE L*a*b*, in which a distance of about 2 is just seen."""
    import numpy as np

    linear = np.array(rgb) / 255
    linear = np.where(linear > 0.04045, ((linear + 0.055) / 1.055) ** 2.4, linear / 12.92)
    to_xyz = [[0.4124, 0.3576, 0.1805], [0.2126, 0.7152, 0.0722], [0.0193, 0.1192, 0.9505]]
    x, y, z = np.cbrt(to_xyz @ linear / [0.9505, 1, 1.089])
    return np.array([116 * y - 16, 500 * (x - y), 200 * (y - z)])


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_true_and_predicted_differ_for_every_kind_of_sight(page, scheme):
    import numpy as np
    from PIL import Image

    with chromium(scheme=scheme) as browser:
        browser.get(page + "#f7")
        opened(browser, 7)
        browser.execute_script("document.querySelector('.legend').scrollIntoView({block: 'center'})")
        for sight in ("none", "protanopia", "deuteranopia", "tritanopia", "achromatopsia"):
            browser.execute_cdp_cmd("Emulation.setEmulatedVisionDeficiency", {"type": sight})
            image = Image.open(io.BytesIO(browser.get_screenshot_as_png())).convert("RGB")
            rects = [find(browser, selector)[0].rect for selector in (".legend .up", ".legend .down")]
            colours = [image.getpixel((int(rect["x"] + 6), int(rect["y"] + 4))) for rect in rects]
            ground = image.getpixel((int(rects[0]["x"] - 10), int(rects[0]["y"] + 4)))
            for a, b in itertools.combinations([*colours, ground], 2):
                assert np.linalg.norm(lab(a) - lab(b)) > 15, (sight, a, b)


@pytest.mark.skipif(
    not AXE.exists(), reason="no axe-core here: `make browser` installs it where there is npm"
)
@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [400, 1600])
def test_axe_finds_no_serious_fault(page, two_runs, scheme, width):
    run = (
        "axe.run().then((found) => arguments[0](found.violations)).catch((err) => arguments[0](String(err)))"
    )
    with chromium(width, 900, scheme) as browser:
        browser.set_script_timeout(60)
        for address in (page, page + "#f7", page + "#f30", two_runs):
            browser.get("about:blank")
            browser.get(address)
            if "#" in address:
                opened(browser, int(address.split("#f")[1]))
                browser.execute_script(
                    "document.querySelectorAll('details').forEach((node) => { node.open = true; })"
                )
            browser.execute_script(AXE.read_text())
            faults = browser.execute_async_script(run)
            assert isinstance(faults, list), faults
            assert [
                (fault["id"], fault["nodes"][0]["html"][:200], fault["nodes"][0]["failureSummary"][:300])
                for fault in faults
                if fault["impact"] in ("serious", "critical")
            ] == []
