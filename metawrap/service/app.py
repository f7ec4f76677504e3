"""`create_app`: a web page and an API, on a classifier, or on a learner that fits one to the photos of a request.

    GET  /              the page
    GET  /api           what is served, and the limits
    POST /api/learn     classes and photos, multipart/form-data -> the id of a classifier, and its estimate
    POST /api/predict   a photo as the body; ?classifier=ID of a fitted one -> names with probabilities

No request writes a file. An error is a JSON object with one text, "error".
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import secrets
from collections import OrderedDict
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from itertools import islice
from typing import Any, TypeVar

import anyio
from anyio.to_thread import run_sync
from fastapi import FastAPI, HTTPException, Request, Response
from starlette.exceptions import HTTPException as AnyHTTPException

from metawrap.classifier import Classifier, Estimate, Photos
from metawrap.data.pictures import decode_image
from metawrap.data.preprocessing import Preprocessing
from metawrap.errors import ArgumentError, MetaWrapError, printable
from metawrap.service.uploads import Limits, Uploads, busy
from metawrap.templates import packaged_text

_HEADERS = {"Cache-Control": "no-store", "X-Content-Type-Options": "nosniff", "Referrer-Policy": "no-referrer"}
_TOP = 20
_SHOWN = 10  # confusions, near-duplicates
T = TypeVar("T")


@dataclass(frozen=True)
class Adapter:
    """fit: photos to a classifier and its estimate. preprocessing: that of the photos. words: about the network."""

    fit: Callable[[Photos], tuple[Classifier, Estimate | None]]
    preprocessing: Preprocessing
    words: str = ""


def create_app(source: Classifier | Adapter, limits: Limits | None = None) -> FastAPI:
    """The service, an ASGI application.

    Args:
        source: a classifier to predict with, or what fits classifiers. limits: the default ones if None.
    Raises:
        ArgumentError: a classifier of texts.
    """
    if isinstance(source, Classifier) and not isinstance(source.preprocessing, Preprocessing):
        raise ArgumentError("source: it is a classifier of texts, and the page takes photos. Use metawrap predict.")
    service = _Service(source, limits or Limits())
    page, policy = _page()
    app = FastAPI(title="metawrap", docs_url=None, redoc_url=None, openapi_url=None)

    async def show() -> Response:
        return Response(page, media_type="text/html", headers=_HEADERS | {"Content-Security-Policy": policy})

    app.add_api_route("/", show, methods=["GET"])
    app.add_api_route("/api", service.about, methods=["GET"])
    app.add_api_route("/api/learn", service.learn, methods=["POST"])
    app.add_api_route("/api/predict", service.predict, methods=["POST"])
    app.add_exception_handler(AnyHTTPException, _refused)
    app.add_exception_handler(MetaWrapError, _explained)
    app.add_exception_handler(Exception, _unexpected)
    return app


class _Service:
    def __init__(self, source: Classifier | Adapter, limits: Limits) -> None:
        self.limits, self.uploads = limits, Uploads(limits)
        self.adapter = source if isinstance(source, Adapter) else None
        self.served = source if isinstance(source, Classifier) else None
        self.fitted: OrderedDict[str, Classifier] = OrderedDict()
        self.fitting = False
        self.threads: anyio.CapacityLimiter | None = None

    async def about(self) -> Response:
        return _answer(
            {
                "learns": self.adapter is not None,
                "network": self.adapter.words if self.adapter else "",
                "classes": list(self.served.classes) if self.served else [],
                "limits": asdict(self.limits),
            }
        )

    async def learn(self, request: Request) -> Response:
        adapter = self.adapter
        if adapter is None:
            raise HTTPException(404, "This service predicts alone: it serves a classifier that is made.")
        self._check_idle()  # Before the photos arrive, which may take a while.
        async with self.uploads.labelled(request) as (names, contents):
            self._check_idle()
            self.fitting = True
            try:
                # Not abandoned if the client goes away: the next fit waits for the end of this one.
                classifier, found = await self._in_thread(lambda: self._fit(adapter, names, contents))
            finally:
                self.fitting = False
        self.fitted[identity := secrets.token_urlsafe(16)] = classifier
        while len(self.fitted) > self.limits.kept:
            self.fitted.popitem(last=False)
        return _answer({"classifier": identity, **found})

    async def predict(self, request: Request, classifier: str = "") -> Response:
        found = self.fitted.get(classifier) if classifier else self.served
        if found is None:
            if classifier:
                raise HTTPException(
                    404, "This classifier is not here any more: only the last ones are kept. Learn again."
                )
            raise HTTPException(404, "This service has no classifier of its own. Learn one, and name its id.")
        if classifier:
            self.fitted.move_to_end(classifier)
        async with self.uploads.photo(request) as content:
            ranking = await self._in_thread(lambda: self._ranking(found, content))
        return _answer({"classes": [{"name": name, "probability": p} for name, p in ranking]})

    def _check_idle(self) -> None:
        if self.fitting:
            raise busy("Another classifier is being fitted")

    async def _in_thread(self, work: Callable[[], T]) -> T:
        self.threads = self.threads or anyio.CapacityLimiter(self.limits.decoders)
        return await run_sync(work, limiter=self.threads)

    def _fit(self, adapter: Adapter, names: list[str], contents: Any) -> tuple[Classifier, dict[str, Any]]:
        photos = Photos.of(names, contents, adapter.preprocessing, self.limits.photo_pixels)
        classifier, estimate = adapter.fit(photos)
        found = None if estimate is None else estimate.to_dict()
        if found is not None:
            found["confused"] = found["confused"][:_SHOWN]
        pairs = [[one, other] for one, other, apart in islice(photos.near_duplicates(), 1_000) if apart]
        return classifier, {
            "classes": list(photos.classes),
            "method": classifier.about["method"],
            "estimate": found,
            "alike_in_two_classes": pairs[:_SHOWN],
        }

    def _ranking(self, classifier: Classifier, content: bytes) -> tuple[tuple[str, float], ...]:
        way: Any = classifier.preprocessing
        decoding = replace(way.decoding, max_pixels=self.limits.photo_pixels)
        pixels = decode_image(content, "the photo", decoding).transpose(1, 2, 0)
        return classifier.predict_prepared([pixels])[0].ranking[:_TOP]


def _page() -> tuple[str, str]:
    """The page, and a policy under which it runs its own script alone."""
    page = packaged_text("metawrap.service", "page.html")
    [script] = re.findall(r"<script>(.*?)</script>", page, re.DOTALL)
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    policy = f"default-src 'none'; script-src 'sha256-{digest}'; style-src 'unsafe-inline'; img-src blob: data:; "
    return page, policy + "connect-src 'self'; base-uri 'none'; form-action 'none'; frame-ancestors 'none'"


def _answer(content: dict[str, Any], status: int = 200, headers: Any = None) -> Response:
    # In ASCII: no text of a request can fail to be written.
    return Response(json.dumps(content), status, _HEADERS | (headers or {}), "application/json")


def _refused(request: Request, error: Any) -> Response:
    return _answer({"error": error.detail}, error.status_code, error.headers)


def _explained(request: Request, error: Exception) -> Response:
    return _answer({"error": printable(str(error))}, 400)


def _unexpected(request: Request, error: Exception) -> Response:
    return _answer({"error": "The service failed at this request; its log says why."}, 500)
