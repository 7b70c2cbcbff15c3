"""Take the pictures of reports/report.html that the documents show, in a headless Chromium.

python tools/report_pictures.py
"""

from __future__ import annotations

import base64
import shutil
import time
from pathlib import Path

from selenium import webdriver
from selenium.webdriver.chrome.service import Service

ROOT = Path(__file__).resolve().parent.parent
PAGE = (ROOT / "reports" / "report.html").as_uri()
WIDTH = 1100
PICTURES = (  # name, height, color scheme, the section at its top, and what to do there
    ("report", 1000, "light", "", ""),
    ("report-figures", 900, "dark", "win-rates", ""),
    ("report-prompts", 760, "light", "samples", "document.getElementById('view-heat').click()"),
)


def main() -> None:
    """Write docs/images/report*.png."""
    options = webdriver.ChromeOptions()
    for argument in ("--headless=new", "--no-sandbox", "--hide-scrollbars"):
        options.add_argument(argument)
    browser = webdriver.Chrome(options=options, service=Service(shutil.which("chromedriver")))
    try:
        for name, height, scheme, section, action in PICTURES:
            features = [{"name": "prefers-color-scheme", "value": scheme}]
            browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": features})
            size = {"width": WIDTH, "height": height, "deviceScaleFactor": 1, "mobile": False}
            browser.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", size)
            browser.get("about:blank")
            browser.get(PAGE)
            browser.execute_script(action)
            time.sleep(1)  # what is drawn late moves what stands below it
            browser.execute_script(
                "document.documentElement.style.scrollBehavior = 'auto';"
                " document.getElementById(arguments[0])?.scrollIntoView()",
                section,
            )
            time.sleep(0.5)
            picture = browser.execute_cdp_cmd("Page.captureScreenshot", {})["data"]
            path = ROOT / "docs" / "images" / f"{name}.png"
            path.write_bytes(base64.b64decode(picture))
            print(f"wrote {path.relative_to(ROOT)}")
    finally:
        browser.quit()


if __name__ == "__main__":
    main()
