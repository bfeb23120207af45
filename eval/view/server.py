"""The page over HTTP: Starlette and uvicorn, this machine alone unless a token is asked for."""

from __future__ import annotations

import hmac
import json
import secrets
import socket
from collections.abc import Awaitable, Callable
from contextlib import closing
from typing import Any

from eval.view.cohort import Cohort
from eval.view.model import UnknownName
from eval.view.page import page_file, page_files
from hibio.config.files import ConfigError
from pathways.errors import PathwayError
from preprocessing.errors import DataError
from preprocessing.store.layout import encode_jpeg

LOOPBACK = ("127.0.0.1", "localhost", "::1")
COOKIE = "hibio_token"
MOST_BYTES = 16 << 20  # of the body of a question
_POLICY = (
    "default-src 'self'; img-src 'self' data: blob:; style-src 'self' 'unsafe-inline'; "
    "object-src 'none'; base-uri 'none'; frame-ancestors 'none'"
)
_SAFE = {
    "Content-Security-Policy": _POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}
_INSTALL = (
    'the page is served by starlette and uvicorn: pip install "hibio[view]" (`hibio view --export '
    "DIR` needs neither)"
)
Endpoint = Callable[[Any], Awaitable[Any]]


class Answers:
    """Every address of the page and what it answers."""

    def __init__(self, cohort: Cohort) -> None:
        self.cohort = cohort

    def page(self, request: Any) -> Any:
        """A file of the page, by its name in a fixed table."""
        data, kind = page_file(request.path_params.get("name", "index.html"))
        return _response(data, kind)

    def facts(self, request: Any) -> Any:
        """The cohort."""
        return _json(self.cohort.facts())

    def doing(self, request: Any) -> Any:
        """What takes its time now."""
        return _json(self.cohort.model.doing())

    def slide(self, request: Any) -> Any:
        """One slide."""
        return _json(self._slide(request).facts())

    def places(self, request: Any) -> Any:
        """Level-0 pixels of the spots, x and y of each in turn, as float32."""
        return _numbers(self._slide(request).xy_px0.astype("<f4").tobytes())

    def tile(self, request: Any) -> Any:
        """A tile of the deep zoom."""
        level, column, row = (_whole(request, name) for name in ("level", "column", "row"))
        try:
            return _response(self._slide(request).zoom.tile(level, column, row), "image/jpeg")
        except OverflowError as error:
            raise UnknownName("no such tile") from error

    def heat(self, request: Any) -> Any:
        """Values of the spots as float32, what they are in the header ``hibio-about``."""
        asked, kind = request.query_params.get("q", ""), request.query_params.get("kind", "")
        if not asked.strip() or kind not in ("measured", "predicted"):
            raise ConfigError("ask with q=NAME and kind=measured or kind=predicted")
        found = self._slide(request).heat(asked, kind)
        about = json.dumps(found.about)  # in ASCII, as a header must be
        return _numbers(found.values.astype("<f4").tobytes(), {"hibio-about": about})

    def regions(self, request: Any) -> Any:
        """Regions of one level, as numbers."""
        return _numbers(self._slide(request).regions(request.path_params["level"]))

    def spot(self, request: Any) -> Any:
        """One spot."""
        return _json(self._slide(request).spots([_whole(request, "spot")])[0])

    def within(self, request: Any) -> Any:
        """The regions of one spot."""
        return _json(self._slide(request).within([_whole(request, "spot")])[0])

    def near(self, request: Any) -> Any:
        """The nearest spots of other slides, by image or by omics."""
        slide, by = request.path_params["slide"], request.path_params["by"]
        return _json(self.cohort.near(slide, [_whole(request, "spot")], by)[0])

    def patch(self, request: Any) -> Any:
        """The patch of a spot."""
        slide, spot = request.path_params["slide"], _whole(request, "spot")
        return _response(encode_jpeg(self.cohort.patches(slide, [spot])[0]), "image/jpeg")

    def area(self, request: Any, body: bytes) -> Any:
        """Profile of the spots in the body: ``{"spots": [...]}``."""
        try:
            spots = json.loads(body)["spots"]
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise ConfigError('the body must be JSON: {"spots": [numbers]}') from error
        if not isinstance(spots, list) or not all(type(one) is int for one in spots):
            raise ConfigError("spots must be a list of whole numbers")
        return _json(self._slide(request).area(spots))

    def _slide(self, request: Any) -> Any:
        return self.cohort.slide(request.path_params["slide"])


def application(cohort: Cohort, *, token: str = "", hosts: tuple[str, ...] = LOOPBACK) -> Any:
    """The page as a Starlette application.

    Args:
        cohort: what it shows.
        token: what a visitor must bring; "" for none.
        hosts: names that it may be asked by; another one is a page of someone else that was
            pointed at this machine.

    Raises:
        ConfigError: starlette is not installed.
    """
    try:
        from starlette.applications import Starlette
        from starlette.middleware import Middleware
        from starlette.middleware.trustedhost import TrustedHostMiddleware
        from starlette.routing import Route
    except ImportError as error:
        raise ConfigError(_INSTALL) from error
    answers = Answers(cohort)
    in_slide = "/data/slides/{slide}"
    routes = {
        "/": answers.page,
        "/page/{name}": answers.page,
        "/data/cohort.json": answers.facts,
        "/data/doing.json": answers.doing,
        f"{in_slide}/slide.json": answers.slide,
        f"{in_slide}/places": answers.places,
        f"{in_slide}/tiles/{{level}}/{{column}}_{{row}}.jpg": answers.tile,
        f"{in_slide}/heat": answers.heat,
        f"{in_slide}/regions/{{level}}": answers.regions,
        f"{in_slide}/spots/{{spot}}.json": answers.spot,
        f"{in_slide}/within/{{spot}}.json": answers.within,
        f"{in_slide}/near/{{by}}/{{spot}}.json": answers.near,
        f"{in_slide}/patches/{{spot}}.jpg": answers.patch,
    }
    made = [Route(path, _guarded(answer, token)) for path, answer in routes.items()]
    made.append(Route(f"{in_slide}/area", _guarded(answers.area, token), methods=["POST"]))
    allowed = ["*"] if token else [*hosts, "[::1]"]
    trusted = Middleware(TrustedHostMiddleware, allowed_hosts=allowed)
    handlers = {404: _not_there, 405: _not_there}
    return Starlette(routes=made, middleware=[trusted], exception_handlers=handlers)


def _guarded(answer: Callable[..., Any], token: str) -> Endpoint:
    """An endpoint that asks for the token, works in a thread, and tells errors in one line."""
    from starlette.concurrency import run_in_threadpool

    async def endpoint(request: Any) -> Any:
        given = request.query_params.get("token") or request.cookies.get(COOKIE, "")
        if token and not hmac.compare_digest(given.encode(), token.encode()):
            return _error(401, "this page needs the token that `hibio view` printed: ?token=...")
        parts: tuple[Any, ...] = (request,)
        if request.method == "POST":
            body = b""
            async for chunk in request.stream():
                body += chunk
                if len(body) > MOST_BYTES:
                    return _error(413, f"at most {MOST_BYTES} bytes")
            parts = (request, body)
        try:
            found = await run_in_threadpool(answer, *parts)
        except UnknownName as error:
            return _error(404, str(error))
        except (ConfigError, PathwayError, DataError, OSError) as error:
            return _error(400, str(error))
        if token and "token" in request.query_params:
            found.set_cookie(COOKIE, token, httponly=True, samesite="strict")
        return found

    return endpoint


def _response(data: bytes, kind: str, more: dict[str, str] | None = None, status: int = 200) -> Any:
    from starlette.responses import Response

    return Response(data, status, {**_SAFE, **(more or {})}, kind)


def _numbers(data: bytes, more: dict[str, str] | None = None) -> Any:
    return _response(data, "application/octet-stream", more)


def _json(value: Any, status: int = 200) -> Any:
    data = json.dumps(value, allow_nan=False).encode()
    return _response(data, "application/json", status=status)


def _error(status: int, words: str) -> Any:
    return _json({"error": " ".join(words.split())}, status)


async def _not_there(request: Any, error: Any) -> Any:
    return _error(error.status_code, "there is nothing at this address")


def _whole(request: Any, name: str) -> int:
    text = request.path_params[name]
    if not (text.isascii() and text.isdigit() and len(text) < 10):
        raise UnknownName(f"{name} {text[:40]!r} is no number of one")
    return int(text)


def serve(cohort: Cohort, host: str = LOOPBACK[0], port: int = 8000) -> None:
    """Serve the page until it is stopped; prints where it is.

    A host other than this machine's own gets a token, printed once, in the address.

    Raises:
        ConfigError: the port is in use, or starlette or uvicorn are not installed.
    """
    token = "" if host in LOOPBACK else secrets.token_urlsafe(24)
    page_files()  # says what is missing before anything is computed
    app = application(cohort, token=token)
    try:
        import uvicorn
    except ImportError as error:
        raise ConfigError(_INSTALL) from error
    try:
        family = socket.AF_INET6 if ":" in host else socket.AF_INET
        listening = socket.create_server((host, port), family=family)
    except (OSError, OverflowError) as error:
        raise ConfigError(
            f"cannot listen on {host} port {port} ({error}); choose another one with --port, 0 for "
            "any that is free"
        ) from error
    with closing(listening):
        shown = f"[{host}]" if ":" in host else host
        address = f"http://{shown}:{listening.getsockname()[1]}/"
        print(address + (f"?token={token}" if token else ""), flush=True)
        config = uvicorn.Config(app, log_level="warning", access_log=False)
        with cohort.embedding_ahead():
            uvicorn.Server(config).run(sockets=[listening])
