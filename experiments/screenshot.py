"""The picture of the feature browser in the README, taken by headless Chromium.

python experiments/screenshot.py demo/report.html docs/browser.png --search import
"""

import argparse
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests"), str(ROOT / "tests" / "report")]


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("report")
    parser.add_argument("out")
    parser.add_argument("--search", default="", help="words to type; the first feature found is opened")
    parser.add_argument("--feature", type=int, help="feature to open instead")
    parser.add_argument("--size", type=int, nargs=2, default=(1600, 1000), metavar=("WIDTH", "HEIGHT"))
    parser.add_argument("--scheme", choices=("light", "dark"), default="light")
    args = parser.parse_args()
    from PIL import Image
    from test_report_browser import chromium

    with chromium(*args.size, args.scheme) as browser:
        browser.get(Path(args.report).resolve().as_uri())
        browser.execute_script(
            """const box = document.getElementById("search");
            box.value = arguments[0];
            box.dispatchEvent(new Event("input"));
            const id = arguments[1] != null ? `f${arguments[1]}` : arguments[0] && shown[0]?.id;
            if (id) location.hash = `#${id}`;""",
            args.search,
            args.feature,
        )
        browser.set_script_timeout(60)
        browser.execute_async_script("contexts(runs[0]).then(arguments[0].bind(null, 1))")
        time.sleep(0.5)  # the contexts are painted
        browser.save_screenshot(args.out)
    # Text on two grounds needs few colours: a quarter of the size.
    Image.open(args.out).convert("P", palette=Image.Palette.ADAPTIVE, colors=128).save(
        args.out, optimize=True
    )


if __name__ == "__main__":
    main()
