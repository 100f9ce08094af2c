"""`eqvae explore`: what its page shows, who can reach it, and the page in a browser without a network."""

import base64
import gc
import io
import json
import os
import shutil
import socket
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from dataclasses import replace
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from eqvae.autoencoders.padding import set_padding_mode
from eqvae.cli import run
from eqvae.drawing.exploration import encode_still, kept_html, rows_html, spectra_html
from eqvae.drawing.pictures import encode_animation
from eqvae.errors import UserError
from eqvae.images import BrokenImageError, Pixels, open_images
from eqvae.methods import METHODS, Pair
from eqvae.runs.explore import ExploreConfig, list_pairs, list_pictures, make_views
from eqvae.runs.explore_page import Page, serve
from eqvae.runs.explore_views import NUM_FRAMES, Choice, Views

CHROMIUM, DRIVER = shutil.which("chromium"), shutil.which("chromedriver")
needs_gradio = pytest.mark.skipif(find_spec("gradio") is None, reason="gradio is not installed")

quiet = pytest.mark.filterwarnings("ignore")  # gradio leaves event loops open, and uses what others deprecate

PAIRS = {name: kind() for name, kind in METHODS.items() if issubclass(kind, Pair)}
CAT = Choice(picture="cat", num_cells=16)


def views_of(*autoencoders: torch.nn.Module) -> Views:
    pictures = {"cat": (open_images("photos", split="evaluation"), 0)}
    named = {f"{index} {each.name}": each for index, each in enumerate(autoencoders)}
    return Views(
        named,
        pictures,
        PAIRS,
        pixels=Pixels(channels=autoencoders[0].image_channels),
        image_size_px=128,
        device=torch.device("cpu"),
    )


@pytest.mark.parametrize("choice", [CAT, replace(CAT, degrees=90.0), replace(CAT, degrees=-180.0)])
def test_an_equivariant_autoencoder_shows_the_same_both_ways(averaging_autoencoder, choice: Choice):
    views = views_of(averaging_autoencoder)
    (left,), (right,) = views.encoded_then_moved(choice), views.moved_then_encoded(choice)
    assert torch.equal(left.seen[3].picture, right.seen[0].picture), "τ∘E(x) and E(τ∘x)"
    decoded = (each.picture.int() for each in (left.seen[1], right.seen[1]))
    torch.testing.assert_close(*decoded, atol=1, rtol=0.0)  # of 255
    assert right.figures[1] == "latent error 0.000"
    assert left.figures[0] == right.figures[0]


def test_a_scale_that_reflection_cannot_pad_is_one_line(small_autoencoder):
    set_padding_mode(small_autoencoder, "reflect")
    views = views_of(small_autoencoder)
    with pytest.raises(UserError, match="can't be padded by reflection"):
        views.encoded_then_moved(replace(CAT, num_cells=1))


def test_what_the_sliders_choose_is_the_papers_where_it_can_be(small_autoencoder, averaging_autoencoder):
    views = views_of(small_autoencoder, averaging_autoencoder)
    assert views.num_cells == 16, "of the autoencoder with the larger stride"
    names = {
        choice: views.encoded_then_moved(choice)[0].figures[1]
        for choice in (
            CAT,
            replace(CAT, degrees=-90.0),
            replace(CAT, degrees=90.0, num_cells=4),
            replace(CAT, degrees=100.0, right=0.25),
        )
    }
    assert list(names.values()) == ["identity", "270°", "s = 0.25 · 90°", "shift (0.25, 0) · 10° · 90°"]


def test_the_pictures_of_a_row_have_one_size_and_stand_in_the_middle(averaging_autoencoder):
    (row,) = views_of(averaging_autoencoder).encoded_then_moved(replace(CAT, num_cells=8))
    assert [seen.formula for seen in row.seen] == ["τ∘x", "D(τ∘E(x))", "difference", "τ∘E(x)"]
    for seen in row.seen:
        assert seen.picture.shape == (1, 3, 128, 128)
        assert (seen.picture[..., :32, :] == 255).all(), "white around"
        assert not (seen.picture[..., 32:96, 32:96] == 255).all()
    cells = row.seen[3].picture[0, :, 32:96, 32:96].unflatten(-1, (-1, 8)).unflatten(-3, (-1, 8))
    assert (cells == cells[..., :1, :, :1]).all(), "each latent cell is as large as its pixels"


@pytest.mark.parametrize("pair", PAIRS)
def test_every_pair_can_be_seen(small_autoencoder, pair: str):
    views = views_of(small_autoencoder)
    first, second = (replace(CAT, method=pair, draw=draw) for draw in (0, 1))
    (left,), (right,) = views.encoded_then_moved(first), views.moved_then_encoded(first)
    assert [seen.formula for seen in (*left.seen, *right.seen)] == [
        "a(x)", "D(b(E(x)))", "difference", "b(E(x))", "E(a(x))", "D(E(a(x)))"
    ]  # fmt: skip
    again, other = views.encoded_then_moved(first)[0], views.encoded_then_moved(second)[0]
    assert torch.equal(left.seen[1].picture, again.seen[1].picture), "a draw is the same each time"
    is_fixed = pair in ("plain", "blend", "eq", "dsm")  # or may change nothing
    assert is_fixed or not torch.equal(left.seen[1].picture, other.seen[1].picture)


def test_a_pair_that_an_autoencoder_does_not_take_is_refused_in_words(small_discrete_autoencoder):
    from eqvae.errors import UserError

    with pytest.raises(UserError, match="detok makes no sense for 'small-discrete'"):
        views_of(small_discrete_autoencoder).encoded_then_moved(replace(CAT, method="detok"))


def test_a_dropped_picture_is_decoded_as_all_are(small_autoencoder, tmp_path):
    views = views_of(small_autoencoder)
    flat, damaged = tmp_path / "flat.png", tmp_path / "damaged.png"
    Image.new("I;16", (300, 200), 40000).save(flat)
    damaged.write_bytes(flat.read_bytes()[:60])
    choice = replace(CAT, picture=flat)
    (row,) = views.reconstructed(choice)
    assert row.seen[0].picture.unique().tolist() == [156], "40000 of 65535"
    assert spectra_html(views.spectra(choice)).count("no spectrum") == 1
    with pytest.raises(BrokenImageError, match="damaged.png"):
        views.encoded_then_moved(replace(CAT, picture=damaged))


def test_the_page_s_html_holds_all_it_shows_and_no_name_is_taken_for_html(small_autoencoder, averaging_autoencoder):
    small_autoencoder.name = "<script>"
    views = views_of(averaging_autoencoder, small_autoencoder)
    html = rows_html("title", views.encoded_then_moved(CAT)) + spectra_html(views.spectra(CAT))
    assert html.count("data:image/webp;base64,") == 8
    assert html.count("<svg") == 1
    assert "<script>" not in html
    assert "&lt;script&gt;" in html
    assert "excess" in html


def test_a_still_and_a_rotation_can_be_kept(averaging_autoencoder, small_autoencoder):
    views = views_of(averaging_autoencoder, small_autoencoder)
    still = Image.open(io.BytesIO(encode_still(views.still(replace(CAT, degrees=30.0)))))
    assert still.format == "PNG"
    assert still.width > 6 * 128
    assert still.height > 2 * 128
    frames = views.rotation(CAT)
    for kind in ("webp", "gif"):
        content = encode_animation(frames, kind)
        moving = Image.open(io.BytesIO(content))
        assert (moving.format, moving.n_frames, moving.info["loop"]) == (kind.upper(), NUM_FRAMES, 0)
        assert base64.b64decode(kept_html(content, kind, "rotation").split("base64,")[1].split('"')[0]) == content
    upright, half = (np.asarray(frames[index]) for index in (0, NUM_FRAMES // 2))
    cell = slice(-8 - 128, -8), slice(8, 8 + 128)
    assert np.array_equal(upright[cell][::-1, ::-1], half[cell]), "half way it is upside down"


def test_pictures_and_pairs_are_listed(photographs):
    photos = [open_images("photos", split=split) for split in ("evaluation", "train")]
    assert list(list_pictures(photos, 4)) == ["chelsea.webp", "astronaut.webp", "coffee.webp", "hubble_deep_field.jpg"]
    assert list(list_pictures([open_images(str(photographs))], 2)) == ["0.png", "1.png"]
    config = ExploreConfig(autoencoders=("tiny-kl",), method=("eq(transforms=scale)",))
    assert list(list_pairs(config)) == [*PAIRS, "eq(transforms=scale)"]


def test_pictures_of_other_channels_are_shown_in_three_of_them(small_autoencoder, tmp_path):
    small_autoencoder.image_channels = 5
    small_autoencoder.encoder[0] = torch.nn.Conv2d(5, 16, 4, 4)
    small_autoencoder.layer = torch.nn.Conv2d(8, 5, 3, padding=1)
    np.save(tmp_path / "bands.npy", np.random.default_rng(0).integers(0, 256, (96, 96, 5), dtype=np.uint8))
    choice = replace(CAT, picture=tmp_path / "bands.npy", degrees=90.0)
    views = views_of(small_autoencoder)
    (left,), (right,) = views.encoded_then_moved(choice), views.moved_then_encoded(choice)
    assert left.seen[0].picture.shape == right.seen[1].picture.shape == (1, 3, 128, 128)


@pytest.mark.parametrize(
    ("flags", "said"),
    [
        (["tiny-kl", "--image-size", "100"], "--image-size 100 is not divisible by the stride 8"),
        (["tiny-kl", "--method", "kl"], "--method 'kl' is no single pair"),
        (["tiny-kl", "--port", "70000"], "--port is 70000"),
        (["tiny-lk"], "tiny-kl"),
        (["tiny-kl", "--port", "TAKEN"], "Choose another; 0 takes any free one"),
    ],
)
def test_wrong_input_is_one_line(capsys, flags: list[str], said: str):
    if "TAKEN" in flags and find_spec("gradio") is None:
        pytest.skip("gradio is not installed")
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        assert run(["explore", *(port if flag == "TAKEN" else flag for flag in flags), "--no-open-browser"]) == 2
    error = capsys.readouterr().err.splitlines()
    assert len(error) == 1
    assert said in error[0]


def test_without_its_library_one_line_says_what_to_install(capsys, monkeypatch):
    monkeypatch.setattr("eqvae.runs.explore_page.find_spec", lambda name: None)
    assert run(["explore", "untrained:tiny-kl", "--no-open-browser"]) == 2
    assert "pip install 'eqvae[explore]'" in capsys.readouterr().err


def test_a_move_costs_one_decoding():
    """Of the processor's time, with a packaged autoencoder: others compute beside this."""
    views = make_views(ExploreConfig(autoencoders=("tiny-kl",)))
    first = next(iter(views.pictures))

    def spent_sec(degrees: float) -> float:
        began_sec = time.thread_time()
        rows_html("", views.encoded_then_moved(Choice(picture=first, num_cells=16, degrees=degrees)))
        return time.thread_time() - began_sec

    assert min(spent_sec(degrees) for degrees in (0.0, 1.0, 2.0, 3.0)) < 0.15


@pytest.fixture(scope="module")
def page() -> Iterator[Page]:
    """The page of the packaged autoencoder beside an untrained one."""
    if find_spec("gradio") is None:
        pytest.skip("gradio is not installed")
    config = ExploreConfig(autoencoders=("tiny-kl", "untrained:tiny-kl"), num_pictures=3)
    with serve(make_views(config), port=0) as page:
        yield page
    gc.collect()


@quiet
def test_nobody_else_reaches_the_page(page: Page):
    with urllib.request.urlopen(page.address) as answer:
        policy = answer.headers["content-security-policy"]
        text = answer.read().decode()
    assert "default-src 'self'" in policy
    assert "http:" not in policy
    assert "https:" not in policy
    assert '"analytics_enabled":false' in text.replace(" ", "")
    assert "fonts.googleapis" not in text
    foreign = urllib.request.Request(page.address, headers={"Host": "elsewhere.example"})
    with pytest.raises(urllib.error.HTTPError, match="400"):
        urllib.request.urlopen(foreign)
    port = int(page.address.rstrip("/").rsplit(":", 1)[1])
    own = next((each[4][0] for each in socket.getaddrinfo(socket.gethostname(), port, socket.AF_INET)), "127.0.0.1")
    if not own.startswith("127."):
        with pytest.raises(OSError, match="refused"):
            socket.create_connection((own, port), timeout=2)


def post(page: Page, where: str, body: bytes, **headers: str) -> str:
    """Ask for something; the answer's code stands before its text."""
    request = urllib.request.Request(f"{page.address}gradio_api/{where}", body, headers=headers)
    try:
        with urllib.request.urlopen(request) as answer:
            return f"{answer.status} {answer.read().decode()}"
    except urllib.error.HTTPError as error:
        return f"{error.code} {error.read().decode()}"


@quiet
def test_only_what_was_dropped_in_is_read(page: Page, tmp_path: Path):
    secret = tmp_path / "secret.png"
    Image.new("RGB", (90, 70), "orange").save(secret)
    file = {"path": str(secret), "meta": {"_type": "gradio.FileData"}}
    values = ["chelsea.webp", file, 16, 0, 0, 0, "sliders (tau)", 0]
    for number in range(8):
        body = json.dumps({"fn_index": number, "data": values}).encode()
        answer = post(page, "run/predict", body, **{"Content-Type": "application/json"})
        assert not answer.startswith("200") or "figure" not in answer, answer[:300]


@quiet
def test_another_page_can_send_nothing(page: Page):
    body = b'--x\r\nContent-Disposition: form-data; name="files"; filename="a.txt"\r\n\r\nhello\r\n--x--\r\n'
    kind = {"Content-Type": "multipart/form-data; boundary=x"}
    assert post(page, "upload", body, **kind, Origin=page.address.rstrip("/")).startswith("200")
    for foreign in ({"Origin": "http://evil.example"}, {"Origin": "null"}, {"Sec-Fetch-Site": "cross-site"}):
        assert post(page, "upload", body, **kind, **foreign) == "403 asked by another page"


MOVE = """
const [selector, value, target] = arguments, done = arguments[arguments.length - 1];
const input = document.querySelector(selector), box = document.querySelector(target), began = performance.now();
const sources = () => [...box.querySelectorAll("img")].map(item => item.src).join();
const before = sources();
const watch = new MutationObserver(() => {
  const now = sources();
  if (now && now !== before) {
    watch.disconnect();
    Promise.all([...box.querySelectorAll("img")].map(item => item.decode()))
      .then(() => requestAnimationFrame(() => done(performance.now() - began)));
  }
});
watch.observe(box, {subtree: true, childList: true, attributes: true});
input.value = value;
input.dispatchEvent(new Event("input", {bubbles: true}));
"""
"""Moves a slider, and says after how many milliseconds its pictures stand there."""


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    """A browser that finds no host but this one, and keeps a record of what it asks for."""
    if CHROMIUM is None or DRIVER is None:
        pytest.skip("chromium and chromedriver are not installed (apt: chromium-driver)")
    from selenium import webdriver
    from selenium.webdriver.chrome.service import Service

    options = webdriver.ChromeOptions()
    options.binary_location = CHROMIUM
    options.set_capability("goog:loggingPrefs", {"browser": "ALL", "performance": "ALL"})
    for flag in (
        "--headless=new", "--no-sandbox", "--disable-gpu", "--disable-quic", "--disable-dev-shm-usage",
        "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync",
        "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE 127.0.0.1", "--window-size=1400,1100",
        f"--user-data-dir={tmp_path_factory.mktemp('profile')}",
    ):  # fmt: skip
        options.add_argument(flag)
    driver = webdriver.Chrome(options=options, service=Service(DRIVER))
    driver.set_script_timeout(60)
    yield driver
    driver.quit()


def wait_for(browser, selector: str, text: str = "") -> str:
    deadline = time.monotonic() + 60.0
    while time.monotonic() < deadline:
        found = browser.find_elements("css selector", selector)
        if found and text in found[0].text:
            return found[0].text
        time.sleep(0.1)
    raise AssertionError(f"no '{text}' in {selector}")


def choose(browser, selector: str, name: str) -> None:
    browser.find_element("css selector", f"{selector} input").click()
    wait_for(browser, f"{selector} [role=option]")
    options = browser.find_elements("css selector", f"{selector} [role=option]")
    next(option for option in options if name in option.text).click()


def asked_for(browser) -> set[str]:
    messages = [json.loads(entry["message"])["message"] for entry in browser.get_log("performance")]
    return {item["params"]["request"]["url"] for item in messages if item["method"] == "Network.requestWillBeSent"}


@pytest.mark.slow
@needs_gradio
@quiet
def test_the_page_in_a_browser_without_a_network(browser, page: Page, tmp_path: Path):
    browser.get(page.address)
    wait_for(browser, "#spectra", "cycles per latent cell")
    assert "identity" in wait_for(browser, "#fast", "untrained:tiny-kl")
    angle = "#angle input[type=range]"
    taken_ms = []
    for degrees in (20, 40, 60, 80, 90):
        taken_ms.append(browser.execute_async_script(MOVE, angle, str(degrees), "#fast"))
        time.sleep(1.0)  # the other half follows
    print(f"\nfrom slider to picture, ms: {', '.join(f'{each:.0f}' for each in taken_ms)}")  # noqa: T201
    assert "90°" in wait_for(browser, "#fast", "90°")
    wait_for(browser, "#slow", "latent error")

    wait_for(browser, "#still")
    browser.find_element("css selector", "#still").click()
    wait_for(browser, "#kept", "still.png")
    source = browser.find_element("css selector", "#kept a").get_attribute("href")
    assert Image.open(io.BytesIO(base64.b64decode(source.split(",")[1]))).format == "PNG"
    browser.find_element("css selector", "#webp").click()
    wait_for(browser, "#kept", "rotation.webp")

    own = tmp_path / "own.png"
    Image.new("RGB", (90, 70), "orange").save(own)
    browser.find_element("css selector", "#file input[type=file]").send_keys(str(own))
    wait_for(browser, "#spectra", "no spectrum")
    browser.find_element("css selector", "#file button[aria-label]").click()
    wait_for(browser, "#spectra", "cycles per latent cell")
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    browser.find_element("css selector", "#file input[type=file]").send_keys(str(broken))
    assert "'broken.png' cannot be decoded" in wait_for(browser, "#fast .wrong")

    choose(browser, "#picture", "coffee.webp")
    wait_for(browser, "#fast", "PSNR")
    assert browser.find_elements("css selector", "#fast .wrong") == [], "the name counts, and no longer the file"
    choose(browser, "#pair", "viewpoint")
    wait_for(browser, "#fast", "another view")
    assert "D(b(E(x)))" in browser.find_element("css selector", "#fast").text
    assert browser.execute_async_script(MOVE, "#draw input[type=range]", "3", "#fast") > 0.0

    if keep := os.environ.get("EQVAE_SCREENSHOT"):
        browser.save_screenshot(keep)
    foreign = [url for url in asked_for(browser) if not url.startswith((page.address, "data:", "blob:", "chrome:"))]
    assert foreign == []
    assert [entry for entry in browser.get_log("browser") if entry["level"] == "SEVERE"] == [], "nothing was refused"
