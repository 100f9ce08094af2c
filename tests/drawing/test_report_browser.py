"""The page in a real browser, on a phone and on a desk."""

import shutil

import pytest

from eqvae.artifacts.files import read_json, write_json
from eqvae.drawing import write_report

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


CODES = {"token_agreement_rotation": 0.2125, "token_agreement_scale": 0.4083, "codebook_usage": 0.9961,
         "codebook_perplexity": 12345.6}  # fmt: skip


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
    assert "Rotation error −47%" in browser.find_element("css selector", ".lead").text  # noqa: RUF001
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


@pytest.mark.parametrize("width_px", [360, 1280])
@pytest.mark.parametrize(("count", "is_discrete"), [(1, False), (2, False), (2, True)])
def test_cards_fit_and_their_letters_can_be_read(browser, tmp_path, full_evaluations, width_px, count, is_discrete):
    out = tmp_path / "report.html"
    for folder in full_evaluations if is_discrete else ():
        write_json(folder / "metrics.json", read_json(folder / "metrics.json") | CODES)
    write_report(full_evaluations[:count], out)
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width_px, "height": 800, "deviceScaleFactor": 1, "mobile": width_px < 600},
    )
    browser.get(out.as_uri())
    page_px, window_px = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
    assert page_px <= window_px == width_px
    letters_px = browser.execute_script(
        "return [...document.querySelectorAll('.card svg text, .pair svg text')]"
        ".map(item => [parseFloat(getComputedStyle(item).fontSize), item.getScreenCTM()])"
        ".map(([size, place]) => size * Math.hypot(place.c, place.d))"
    )
    assert min(letters_px) >= 9.4
    spilling = browser.execute_script(
        "return [...document.querySelectorAll('.card')].filter(item => item.scrollWidth > item.clientWidth).length"
    )
    assert spilling == 0
    assert browser.get_log("browser") == []


@pytest.mark.parametrize(("scheme", "accent"), [("light", "rgb(11, 122, 117)"), ("dark", "rgb(76, 194, 183)")])
def test_bars_take_the_pages_colours(browser, tmp_path, full_evaluations, scheme, accent):
    out = tmp_path / "report.html"
    write_report(full_evaluations, out)
    preference = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", preference)
    browser.get(out.as_uri())
    fills = browser.execute_script(
        "return [...document.querySelectorAll('.pair svg path')].map(item => getComputedStyle(item).fill)"
    )
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert fills.count(accent) == 4, "one for each of the fine-tuned autoencoder's bars"


@pytest.fixture
def generators(write_training, write_samples, write_score):
    """Runs with long names, a sample set and scores of every kind."""
    more = {"sfid": 6.5, "inception_score": 60.0, "inception_score_std": 1.25, "kid": 0.01, "precision": 0.5}
    return [
        write_training("base", [98.6, 61.0, 43.5], autoencoder="stabilityai/sd-vae-ft-ema"),
        write_training("eq", [90.1, 47.0, 34.1], autoencoder="runs/sd-vae-eq-with-a-long-name"),
        write_samples("drawn", guidance_scale=1.5, guidance_high=0.7),
        write_score("first", samples="runs/drawn-with-guidance/samples.npz", fid=43.5, **more),
        write_score("second", samples="runs/drawn-from-eq/samples.npz", fid=34.1, **more),
    ]


@pytest.mark.parametrize("width_px", [360, 1280])
@pytest.mark.parametrize(("scheme", "accent"), [("light", "rgb(11, 122, 117)"), ("dark", "rgb(76, 194, 183)")])
def test_a_page_of_generators_fits_and_takes_the_pages_colours(browser, tmp_path, generators, width_px, scheme, accent):
    out = tmp_path / "report.html"
    write_report(generators, out)
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        {"width": width_px, "height": 800, "deviceScaleFactor": 1, "mobile": width_px < 600},
    )
    preference = {"features": [{"name": "prefers-color-scheme", "value": scheme}]}
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", preference)
    browser.get(out.as_uri())
    assert "FID −22%" in browser.find_element("css selector", ".lead").text  # noqa: RUF001
    for unfold in (False, True):
        browser.execute_script("document.querySelectorAll('details').forEach(item => item.open = arguments[0])", unfold)
        page_px, window_px = browser.execute_script("return [document.documentElement.scrollWidth, innerWidth]")
        assert page_px <= window_px == width_px
    letters_px = browser.execute_script(
        "return [...document.querySelectorAll('svg text')]"
        ".map(item => [parseFloat(getComputedStyle(item).fontSize), item.getScreenCTM()])"
        ".map(([size, place]) => size * Math.hypot(place.c, place.d))"
    )
    assert min(letters_px) >= 9.4
    strokes = browser.execute_script(
        "return [...document.querySelectorAll('.learning svg path')].map(item => getComputedStyle(item).stroke)"
    )
    shown = browser.execute_script("return [...document.images].map(item => item.naturalWidth)")
    browser.execute_cdp_cmd("Emulation.setEmulatedMedia", {"features": []})
    assert accent in strokes
    assert len(shown) == 2 * 3 + 1
    assert all(width > 0 for width in shown)
    assert browser.get_log("browser") == []
