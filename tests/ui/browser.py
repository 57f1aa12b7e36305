"""A real browser, driven through WebDriver."""

import json
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

BROWSERS = ("chromium", "chromium-browser", "google-chrome")


@contextmanager
def open_browser(width: int = 1280, height: int = 800, *, dark: bool = False) -> Iterator[Any]:
    """A window of so many pixels, without any network but to this machine; skips the test without one."""
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    program = next(filter(None, map(shutil.which, BROWSERS)), None)
    driver_program = shutil.which("chromedriver")
    if program is None or driver_program is None:
        pytest.skip("needs a browser: apt-get install chromium chromium-driver")
    options = webdriver.ChromeOptions()
    options.binary_location = program
    for argument in ("headless=new", "no-sandbox", "disable-dev-shm-usage", "disable-gpu"):
        options.add_argument(f"--{argument}")
    # Whatever is not this machine cannot even be looked up.
    options.add_argument("--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1, EXCLUDE localhost")
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    driver = webdriver.Chrome(options=options, service=Service(driver_program))
    try:
        look(driver, width, height, dark=dark)
        yield driver
    finally:
        driver.quit()


def look(driver: Any, width: int, height: int, *, dark: bool) -> None:
    """Make the window another screen."""
    metrics = {"width": width, "height": height, "deviceScaleFactor": 1, "mobile": width < 600}
    driver.execute_cdp_cmd("Emulation.setDeviceMetricsOverride", metrics)
    scheme = {"name": "prefers-color-scheme", "value": "dark" if dark else "light"}
    driver.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": [scheme]})


def find_violations(driver: Any) -> list[str]:
    """What axe-core finds serious or worse; a test is skipped where it is not at hand."""
    path = os.environ.get("AXE_CORE")
    if not path or not Path(path).is_file():
        pytest.skip("needs axe-core: npm install axe-core, and AXE_CORE=node_modules/axe-core/axe.min.js")
    driver.execute_script(Path(path).read_text("utf-8"))
    # As text: an excerpt that ends within an emoji is no string that WebDriver can pass on.
    script = "const done = arguments[0]; axe.run().then((found) => done(JSON.stringify(found.violations)))"
    found = json.loads(driver.execute_async_script(script))
    return [
        f"{violation['id']}: {violation['nodes'][0]['html'][:200]}"
        for violation in found
        if violation["impact"] in ("serious", "critical")
    ]
