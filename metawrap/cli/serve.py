"""`metawrap serve`: a classifier, a run or a network -> a web page, until Ctrl-C."""

from __future__ import annotations

import logging
import socket
from argparse import Namespace
from pathlib import Path
from typing import Any

from metawrap.classifier import Classifier
from metawrap.cli.sources import check_none_given, source_of
from metawrap.data.preprocessing import Preprocessing
from metawrap.errors import ArgumentError

_CONNECTIONS = 64


def run_serve(arguments: Namespace) -> None:
    """Loads, listens, prints the address, and serves."""
    from metawrap.service import create_app  # Its error says what to install.

    with _listening(arguments.host, arguments.port) as listener:  # First: loading may take minutes.
        host, port = listener.getsockname()[:2]
        server = server_of(create_app(_served(arguments)))
        print(f"Page: http://{f'[{host}]' if ':' in host else host}:{port}/ (Ctrl-C stops it)", flush=True)
        server.run([listener])


def server_of(app: Any) -> Any:
    """The server of an app; `run([listener])` serves until a signal, or until `should_exit` is set."""
    import uvicorn

    logging.getLogger("python_multipart").setLevel(logging.CRITICAL)  # Each broken form is a line.
    # A request that Ctrl-C ends would be a traceback.
    logging.getLogger("uvicorn.error").addFilter(lambda record: "timeout graceful shutdown" not in str(record.exc_info))
    config = uvicorn.Config(
        app, log_level="warning", limit_concurrency=_CONNECTIONS, server_header=False, timeout_graceful_shutdown=5
    )
    return uvicorn.Server(config)


def _served(arguments: Namespace) -> Any:
    from metawrap.service import Adapter

    if (Path(arguments.source) / "classifier.json").exists():
        given = ("method", "weights", "image_size", "options", "model", "checkpoint")
        check_none_given(arguments, given, "a classifier, which has its network, weights and images")
        classifier = Classifier.load(arguments.source)
        print(f"Classifier: {arguments.source}, {len(classifier.classes)} classes")
        return classifier
    source = source_of(arguments)
    print(f"Network: {source.words}")
    assert isinstance(source.preprocessing, Preprocessing)  # No texts were asked for.
    return Adapter(lambda photos: source.fit(source.choose(photos)[0], photos), source.preprocessing, source.words)


def _listening(host: str, port: int) -> socket.socket:
    if not 0 <= port < 2**16:
        raise ArgumentError(f"port: expected 0 to 65535, but got {port}.")
    try:
        return socket.create_server((host, port), family=socket.AF_INET6 if ":" in host else socket.AF_INET)
    except OSError as error:
        raise ArgumentError(
            f"host, port: cannot listen on {host}, port {port} ({error.strerror}). Name another with --host and --port."
        ) from error
