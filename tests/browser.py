"""A browser for tests, if one is installed."""

import shutil
from contextlib import contextmanager

NAMES = ("chromium", "chromium-browser", "google-chrome", "google-chrome-stable")


@contextmanager
def launched():
    """Chromium without a window: the system's, Chrome, or Playwright's own.

    Raises
    ------
    RuntimeError
        If there is none.
    """
    from playwright.sync_api import Error, sync_playwright

    installed = [{"executable_path": path} for path in map(shutil.which, NAMES) if path]
    with sync_playwright() as playwright:
        for options in (*installed, {"channel": "chrome"}, {}):
            try:
                browser = playwright.chromium.launch(**options)
            except Error:
                continue
            yield browser
            browser.close()
            return
    raise RuntimeError("no browser is installed: apt install chromium, or playwright install chromium")
