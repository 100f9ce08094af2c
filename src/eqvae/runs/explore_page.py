"""The page of `eqvae explore`: its controls, and its server, which this machine alone reaches.

Nothing is sent or fetched: the library's statistics, fonts and links are off, the browser is told to load from nowhere
else, and requests under another host's name or from another page are refused, so that no page on the web can ask
through the user's browser.
"""

import contextlib
import os
import socket
import tempfile
import threading
from collections.abc import Awaitable, Callable, Iterator, MutableMapping
from dataclasses import dataclass
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from typing import TYPE_CHECKING, Any

from eqvae.drawing.exploration import dark_colors, encode_still, kept_html, rows_html, spectra_html, wrong_html
from eqvae.drawing.pictures import AnimationFormat, encode_animation
from eqvae.errors import UserError
from eqvae.images import BrokenImageError
from eqvae.runs.explore_views import Choice, Views

if TYPE_CHECKING:
    import gradio

LOOPBACK = "127.0.0.1"

SLIDERS = "sliders (tau)"
"""The first of the list of pairs."""

MAX_DRAW = 99

ROTATIONS: tuple[AnimationFormat, ...] = ("webp", "gif")

DECODED, ENCODED = "encoded, then moved, then decoded", "moved, then encoded"
"""The two halves: the first costs a decoding, the second an encoding too and comes after it."""

QUIET: dict[str, Any] = {
    "show_progress": "hidden", "trigger_mode": "always_last", "queue": False, "api_visibility": "private"
}  # fmt: skip
"""Of events: the last of several moves is answered, at once, and nothing lies over the pictures meanwhile."""

NO_TELEMETRY = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_DISABLE_TELEMETRY": "1", "GRADIO_MCP_SERVER": "False"}

POLICY = (
    "default-src 'self' data: blob: 'unsafe-inline' 'unsafe-eval'; base-uri 'self'; form-action 'self'; "
    "frame-ancestors 'none'"
)
"""Of the browser: everything comes from here. The library's page has scripts in it, and compiles others."""

CSS = """
.seen { display: grid; grid-template-columns: repeat(var(--columns), minmax(0, 1fr)); gap: 0.5rem; }
.seen figure { margin: 0; }
.seen img { width: 100%; height: auto; image-rendering: pixelated; display: block; }
.seen figcaption { font-size: 0.8rem; text-align: center; }
.prose h2, .prose h3 { margin: 0.6rem 0 0.2rem; font-size: 1rem; }
.prose h3, .prose .figures { margin-bottom: 0; white-space: nowrap; overflow: hidden; text-overflow: ellipsis; }
.prose .figures { margin: 0 0 0.3rem; font-size: 0.8rem; opacity: 0.75; }
.wrong { font-weight: 600; }
#kept img { max-width: 100%; }
#spectra svg { max-width: 26rem; }
"""


@dataclass(frozen=True, kw_only=True)
class Page:
    """A page that is being served."""

    address: str
    thread: threading.Thread

    def is_up(self) -> bool:
        """Whether it still answers."""
        return self.thread.is_alive()

    def wait(self, *, sec: float) -> None:
        """Let time pass, or less where the server ends."""
        self.thread.join(sec)


@contextlib.contextmanager
def serve(views: Views, *, port: int) -> Iterator[Page]:
    """Serve the page on this machine alone; what was dropped in is deleted at the end."""
    if find_spec("gradio") is None:
        raise UserError("eqvae explore needs gradio, which is not installed", "Run: pip install 'eqvae[explore]'")
    try:
        listener = socket.create_server((LOOPBACK, port))
    except OSError as error:
        raise UserError(
            f"--port {port} can't be used ({error.strerror})", "Choose another; 0 takes any free one"
        ) from None
    with (
        listener,
        tempfile.TemporaryDirectory(prefix="eqvae-explore-") as uploads,
        _environment(NO_TELEMETRY | {"GRADIO_TEMP_DIR": uploads}),
    ):
        import uvicorn

        server = uvicorn.Server(uvicorn.Config(_app(views), log_level="warning", timeout_graceful_shutdown=1))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, daemon=True)
        thread.start()
        while thread.is_alive() and not server.started:
            thread.join(0.02)
        try:
            yield Page(address=f"http://{LOOPBACK}:{listener.getsockname()[1]}/", thread=thread)
        finally:
            server.should_exit = True
            thread.join()


@contextlib.contextmanager
def _environment(values: dict[str, str]) -> Iterator[None]:
    """Set variables that a library reads, for a while."""
    former = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in former.items():
            if value is None:
                del os.environ[name]
            else:
                os.environ[name] = value


def _app(views: Views) -> Any:
    import gradio
    from fastapi import FastAPI
    from starlette.middleware.trustedhost import TrustedHostMiddleware

    app, blocks = FastAPI(docs_url=None, redoc_url=None, openapi_url=None), _blocks(views)
    blocks.has_launched = True  # from then on, files of an event must be uploaded ones; `launch` alone would set it
    gradio.mount_gradio_app(
        app, blocks, path="/", server_name=LOOPBACK, footer_links=[], run_history=False, ssr_mode=False,
        pwa=False, enable_monitoring=False, mcp_server=False, max_file_size="256mb",
        css=f"{CSS}.dark {{{dark_colors()}}}",
        theme=gradio.themes.Base(font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]),
    )  # fmt: skip
    app.add_middleware(_WithPolicy)
    app.add_middleware(TrustedHostMiddleware, allowed_hosts=[LOOPBACK, "localhost"])
    return app


Message = MutableMapping[str, Any]


def _is_from_elsewhere(scope: Message) -> bool:
    """Whether another page asks: a browser names it, and sends a form's upload without asking us first."""
    headers = dict(scope["headers"])
    origin, host = headers.get(b"origin"), headers.get(b"host", b"")
    return origin not in (None, b"http://" + host) or headers.get(b"sec-fetch-site") == b"cross-site"


class _WithPolicy:
    """Answers this page alone, and tells the browser, with every answer, to load nothing from elsewhere."""

    def __init__(self, app: Callable[..., Awaitable[None]]) -> None:
        self.app = app

    async def __call__(self, scope: Message, receive: Any, send: Callable[[Message], Awaitable[None]]) -> None:
        if scope["type"] == "http" and _is_from_elsewhere(scope):
            await send({"type": "http.response.start", "status": 403, "headers": []})
            await send({"type": "http.response.body", "body": b"asked by another page"})
            return

        async def send_with_policy(message: Message) -> None:
            if message["type"] == "http.response.start":
                own = [(b"content-security-policy", POLICY.encode()), (b"referrer-policy", b"no-referrer")]
                message["headers"] = [*message["headers"], *own]
            await send(message)

        await self.app(scope, receive, send_with_policy)


def _blocks(views: Views) -> "gradio.Blocks":
    """Lay out the page, controls beside what they give, and say what answers to what."""
    import gradio

    def answer(show: Callable[[Choice], Any], outputs: Any, wrong: Callable[[str], Any] = wrong_html) -> dict[str, Any]:
        controls = [*picture, *sliders, *pairs]
        return {"fn": _answering(views, show, wrong), "inputs": controls, "outputs": outputs, **QUIET}

    with gradio.Blocks(title="eqvae explore", analytics_enabled=False, fill_width=True) as blocks, gradio.Row():
        with gradio.Column(scale=1, min_width=280):
            picture, sliders, pairs = _picture_controls(views), _sliders(views), _pair_controls(views)
            still = gradio.Button("Keep a still (PNG)", elem_id="still", size="sm")
            rotations = [gradio.Button(f"Keep a rotation ({kind})", elem_id=kind, size="sm") for kind in ROTATIONS]
        with gradio.Column(scale=5):
            with gradio.Row():  # six pictures of one size
                with gradio.Column(scale=4, min_width=400):
                    fast = gradio.HTML(elem_id="fast")
                with gradio.Column(scale=2, min_width=200):
                    slow = gradio.HTML(elem_id="slow")
            with gradio.Row():
                plain = gradio.HTML(elem_id="plain"), gradio.HTML(elem_id="spectra")
            kept = gradio.HTML(elem_id="kept")

        decode = answer(lambda choice: rows_html(DECODED, views.encoded_then_moved(choice)), fast)
        encode = answer(lambda choice: rows_html(ENCODED, views.moved_then_encoded(choice)), slow, lambda line: "")
        show = answer(partial(_as_it_is, views), plain, lambda line: ("", ""))
        name, file = picture
        # A dropped file counts until another name is chosen.
        for shown in (
            name.input(lambda: None, None, file, **QUIET).then(**decode),
            gradio.on([file.upload, file.clear, blocks.load], **decode),
        ):
            shown.success(**encode).success(**show)
        gradio.on([control.input for control in (*sliders, *pairs)], **decode).success(**encode)
        still.click(**answer(lambda choice: kept_html(encode_still(views.still(choice)), "png", "still"), kept))
        for kind, button in zip(ROTATIONS, rotations, strict=True):
            button.click(**answer(partial(_kept_rotation, views, kind), kept))
    return blocks


def _picture_controls(views: Views) -> list[Any]:
    import gradio

    return [
        gradio.Dropdown(list(views.pictures), label="picture", elem_id="picture"),
        gradio.File(label="or drop one in", type="filepath", height=110, elem_id="file"),
    ]


def _sliders(views: Views) -> list[Any]:
    """In the order of `Choice`."""
    import gradio

    cells = views.num_cells
    return [
        gradio.Slider(1, cells, value=cells, step=1, label=f"scale, cells of {cells}", elem_id="scale"),
        gradio.Slider(-180, 180, value=0, step=1, label="angle, degrees", elem_id="angle"),
        gradio.Slider(-0.5, 0.5, value=0.0, step=0.01, label="shift to the right, widths", elem_id="right"),
        gradio.Slider(-0.5, 0.5, value=0.0, step=0.01, label="shift down, heights", elem_id="down"),
    ]


def _pair_controls(views: Views) -> list[Any]:
    import gradio

    label = "what acts: the sliders' τ, or a method's pair"
    return [
        gradio.Dropdown([SLIDERS, *views.pairs], label=label, elem_id="pair"),
        gradio.Slider(0, MAX_DRAW, value=0, step=1, label="the pair's draw", elem_id="draw"),
    ]


def _answering(views: Views, show: Callable[[Choice], Any], wrong: Callable[[str], Any]) -> Callable[..., Any]:
    """Turn the controls' values into a choice, and what is wrong with it into a line on the page."""

    def answer(*values: Any) -> Any:
        name, file, cells, degrees, right, down, pair, draw = values
        if None in (cells, degrees, right, down, draw):
            return wrong("A number is missing. Give one, or move the slider")
        choice = Choice(
            picture=Path(file) if file else name,
            num_cells=min(max(int(cells), 1), views.num_cells),
            degrees=float(degrees),
            right=float(right),
            down=float(down),
            method=None if pair == SLIDERS else pair,
            draw=int(draw),
        )
        try:
            return show(choice)
        except (UserError, BrokenImageError) as error:
            return wrong(str(error))

    return answer


def _as_it_is(views: Views, choice: Choice) -> tuple[str, str]:
    return rows_html("the picture, not moved", views.reconstructed(choice)), spectra_html(views.spectra(choice))


def _kept_rotation(views: Views, kind: AnimationFormat, choice: Choice) -> str:
    return kept_html(encode_animation(views.rotation(choice), kind), kind, "rotation")
