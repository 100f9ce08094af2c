"""The page in a real browser, on a phone and on a desk."""

import shutil

import pytest

from eqvae.report import write_report

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")

pytestmark = pytest.mark.skipif(
    CHROMIUM is None or DRIVER is None, reason="chromium and chromedriver are not installed (apt: chromium-driver)"
)

FLAGS = (
    "--headless=new",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--disable-dev-shm-usage",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
)


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    for flag in (*FLAGS, f"--user-data-dir={tmp_path_factory.mktemp('profile')}"):
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    yield driver
    driver.quit()


@pytest.mark.parametrize("width_px", [360, 1280])
def test_the_page_fits_and_is_complete(browser, tmp_path, two_evaluations, run_folder, width_px):
    out = tmp_path / "report.html"
    write_report([*two_evaluations, run_folder], out)
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width_px, "height": 800, "deviceScaleFactor": 1, "mobile": width_px < 600},
    )
    browser.get(out.as_uri())
    assert "Rotation error fell by 47%" in browser.find_element("css selector", ".lead").text
    for unfold in (False, True):
        browser.execute_script("document.querySelectorAll('details').forEach(item => item.open = arguments[0])", unfold)
        page_px, window_px = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert page_px <= window_px == width_px
    widths = browser.execute_async_script(
        "const done = arguments[0], images = [...document.images];"
        "Promise.allSettled(images.map(item => item.decode())).then(() => done(images.map(item => item.naturalWidth)))"
    )
    assert len(widths) == 2 * 3 + 2 * 2 * 4
    assert all(width > 0 for width in widths)
    assert browser.get_log("browser") == []
