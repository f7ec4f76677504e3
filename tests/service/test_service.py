"""The API of the service: what it learns and names, and what strangers cannot do to it."""

from __future__ import annotations

import io
import json
import struct
import tempfile
import threading
import time
import zlib
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import anyio
import photos as made
import pytest
import torch

pytest.importorskip("fastapi", reason="the extra 'serve' is not installed")
pytest.importorskip("python_multipart", reason="the extra 'serve' is not installed")
testclient = pytest.importorskip("starlette.testclient", exc_type=(ImportError, RuntimeError))  # type: ignore[arg-type]

from metawrap import ArgumentError, ProtoNet  # noqa: E402
from metawrap.classifier import Classifier, Photos, fit_classifier  # noqa: E402
from metawrap.data import TextPreprocessing  # noqa: E402
from metawrap.service import Adapter, Limits, create_app  # noqa: E402

MARKUP = "<script>window.hacked = 1</script>"
SMALL = Limits(
    photo_bytes=20_000, photo_pixels=10_000, photos=12, request_bytes=100_000, classes=3, kept=2, seconds=0.2,
    upload_bytes=150_000,
)  # fmt: skip


def png(name: str = "red", number: int = 0) -> bytes:
    made.photo(name, number).save(content := io.BytesIO(), "PNG")
    return content.getvalue()


def bomb(side: int) -> bytes:
    """A PNG of a few bytes whose header claims `side` x `side` pixels."""

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", side, side, 8, 2, 0, 0, 0)
    return (
        b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(bytes(1000))) + chunk(b"IEND", b"")
    )


def form(classes: Any = None, files: Any = None) -> dict[str, Any]:
    """The arguments of a request to learn from two photos of each class."""
    classes = list(made.COLOURS) if classes is None else classes
    if files is None:
        files = [(str(k), (f"{n}.png", png(name, n))) for k, name in enumerate(made.COLOURS) for n in range(2)]
    return {"data": {"classes": classes if isinstance(classes, str) else json.dumps(classes)}, "files": files}


@pytest.fixture(scope="module")
def learner() -> Any:
    return ProtoNet(made.network(), norm="running").eval()


def client_of(source: Any, limits: Limits | None = None) -> Any:
    return testclient.TestClient(create_app(source, limits), raise_server_exceptions=False)


@pytest.fixture
def client(learner: Any) -> Iterator[Any]:
    adapter = Adapter(lambda photos: fit_classifier(learner, photos, made.WAY), made.WAY, "a small network")
    with client_of(adapter, SMALL) as client:
        yield client


def refusal(answer: Any, status: int) -> str:
    assert answer.status_code == status, answer.text
    assert list(answer.json()) == ["error"]
    return str(answer.json()["error"])


def test_it_learns_and_names_as_fit_classifier_does(client: Any, learner: Any) -> None:
    contents = [(k, f"{n}.png", png(name, n)) for k, name in enumerate(made.COLOURS) for n in range(2)]
    expected, estimate = fit_classifier(learner, Photos.of(list(made.COLOURS), contents, made.WAY), made.WAY)
    answer = client.post("/api/learn", **form())
    assert answer.status_code == 200, answer.text
    learned = answer.json()
    assert learned["classes"] == list(made.COLOURS)
    assert learned["method"] == "ProtoNet"
    assert estimate is not None
    assert learned["estimate"]["right"] == estimate.right == 6
    for name in made.COLOURS:
        found = client.post(f"/api/predict?classifier={learned['classifier']}", content=png(name, 7)).json()["classes"]
        [prediction] = expected.predict([made.photo(name, 7)])
        assert [each["name"] for each in found] == [each for each, _ in prediction.ranking]
        assert [each["probability"] for each in found] == pytest.approx([p for _, p in prediction.ranking], abs=1e-6)
        assert found[0]["name"] == name


def test_a_served_classifier_predicts_and_does_not_learn() -> None:
    classifier = Classifier.of(made.network(), ("a", "b", MARKUP), made.WAY)
    with client_of(classifier) as client:
        about = client.get("/api").json()
        assert about["classes"] == ["a", "b", MARKUP]
        assert not about["learns"]
        found = client.post("/api/predict", content=png()).json()["classes"]
        assert {each["name"] for each in found} == set(classifier.classes)
        assert sum(each["probability"] for each in found) == pytest.approx(1, abs=1e-5)
        assert "predicts alone" in refusal(client.post("/api/learn", **form()), 404)


def test_the_page_asks_nobody_else_and_runs_its_own_script_alone(client: Any) -> None:
    answer = client.get("/")
    assert answer.headers["content-type"].startswith("text/html")
    assert "https://" not in answer.text
    assert "http://" not in answer.text
    policy = answer.headers["content-security-policy"]
    assert "default-src 'none'" in policy
    assert "unsafe-inline" not in policy.partition("script-src")[2].partition(";")[0]
    assert client.get("/docs").status_code == client.get("/openapi.json").status_code == 404


def test_names_are_data(client: Any) -> None:
    names = [MARKUP, "‏تفاحة", "洋 梨 \N{RED APPLE}\N{ZERO WIDTH JOINER}"]
    answer = client.post("/api/learn", **form(names))
    assert answer.json()["classes"] == [name.strip() for name in names]
    assert answer.headers["content-type"] == "application/json"
    assert answer.headers["x-content-type-options"] == "nosniff"


@pytest.mark.parametrize(
    ("classes", "words"),
    [
        ("no JSON", "list of names"),
        ('{"a": 1}', "list of names"),
        ("[" * 60_000, "list of names"),
        ([1, 2], "list of names"),
        (["red"], "two or more"),
        (["a", "b", "c", "d"], "at most 3"),
        (["red", " "], "Class 2"),
        (["red", "x" * 61], "Class 2"),
        (["red", "gr\x1b[2Jeen"], "control"),
        ('["red", "\\ud800"]', "control"),
        (["Red", "red", "blue"], "look the same"),
    ],
)
def test_wrong_names_are_refused(client: Any, classes: Any, words: str) -> None:
    files = [(str(k), ("a.png", png())) for k in range(1 if classes == ["red"] else 2)]
    assert words in refusal(client.post("/api/learn", **form(classes, files)), 400)


@pytest.mark.parametrize(
    ("content", "words"),
    [
        (b"", "empty"),
        (b"no picture", "no known format"),
        (b"<svg xmlns='http://www.w3.org/2000/svg'/>", "not a readable image|page"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", "no known format"),
        (png()[:200], "not a readable image"),
        (bomb(101), "claims 101 x 101"),
        (bomb(12_000), "claims 12000 x 12000"),
        (bomb(60_000), "bomb"),
    ],
    ids=["empty", "text", "svg", "eps", "cut", "large", "bomb", "huge bomb"],
)
def test_what_is_no_photo_is_refused(client: Any, content: bytes, words: str) -> None:
    identity = client.post("/api/learn", **form()).json()["classifier"]
    if content:
        files = [("0", ("x\x1b.png", content)), ("1", ("b.png", png("blue")))]
        said = refusal(client.post("/api/learn", **form(["a", "b"], files)), 400)
        assert any(each in said for each in words.split("|")), said
        assert "\x1b" not in said
    said = refusal(client.post(f"/api/predict?classifier={identity}", content=content), 400)
    assert any(each in said for each in words.split("|")), said


def test_a_class_without_photos_and_other_fields_are_refused(client: Any) -> None:
    one = ("0", ("a.png", png()))
    assert "no photo of 'b'" in refusal(client.post("/api/learn", **form(["a", "b"], [one])), 400)
    for key in ("2", "-1", "+1", "\u0660", "photo"):
        said = refusal(client.post("/api/learn", **form(["a", "b"], [one, (key, ("a.png", png()))])), 400)
        assert "a number below 2" in said
    both = {**form(["a", "b"], [one])["data"], "more": "x"}
    assert "Too many fields" in refusal(client.post("/api/learn", data=both, files=[one]), 400)


def test_sizes_and_counts_are_limited(client: Any) -> None:
    large, tiny = bytes(20_001), b"x"
    identity = client.post("/api/learn", **form()).json()["classifier"]
    path = f"/api/predict?classifier={identity}"
    assert "too large" in refusal(client.post(path, content=large), 413)
    assert "too large" in refusal(client.post(path, content=iter([large[:10_000]] * 3)), 413)
    assert "too large" in refusal(client.post(path, content=tiny, headers={"content-length": "9" * 5000}), 413)
    assert "'a.png' is too large" in refusal(client.post("/api/learn", **form(["a"], [("0", ("a.png", large))])), 413)
    many = [("0", ("a.png", tiny))] * 13
    assert "Too many files" in refusal(client.post("/api/learn", **form(["a", "b"], many)), 400)
    heavy = [("0", ("a.png", bytes(19_000)))] * 6
    assert "too large" in refusal(client.post("/api/learn", **form(["a", "b"], heavy)), 413)


@pytest.mark.parametrize(
    ("kind", "content", "status"),
    [
        ("application/json", b"{}", 415),
        ("multipart/form-data; boundary=x; charset=idna", b"--x--", 415),
        ("multipart/form-data", b"--x--", 400),
        ("multipart/form-data; boundary=" + "x" * 300, b"--x--", 400),
        ("multipart/form-data; boundary=x", b"no part", 400),
        ("multipart/form-data; boundary=x", b'--x\r\nContent-Disposition: form-data; name="classes"\r\n\r\n["a"', 400),
        ("multipart/form-data; boundary=x", b"--x\r\n" + b"a: b\r\n" * 100 + b"\r\n--x--", 400),
        ("multipart/form-data; boundary=x", b"--x\r\nContent-Disposition: form-data\r\n\r\n--x--", 400),
    ],
)
def test_broken_forms_are_refused(client: Any, kind: str, content: bytes, status: int) -> None:
    assert refusal(client.post("/api/learn", content=content, headers={"content-type": kind}), status)


def test_errors_of_other_paths_are_json_too(client: Any) -> None:
    assert refusal(client.get("/nowhere"), 404)
    assert refusal(client.get("/api/learn"), 405)
    assert "Learn again" in refusal(client.post("/api/predict?classifier=guessed", content=png()), 404)
    assert "no classifier of its own" in refusal(client.post("/api/predict", content=png()), 404)


def test_an_unexpected_error_shows_nothing_of_the_inside() -> None:
    def fail(photos: Photos) -> Any:
        raise RuntimeError("/secret/path")

    with client_of(Adapter(fail, made.WAY)) as client:
        assert "secret" not in refusal(client.post("/api/learn", **form()), 500)
        assert "secret" not in refusal(client.post("/api/learn", **form()), 500)  # It is not busy for ever.


def test_no_request_writes_a_file(client: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: Any, **__: Any) -> Any:
        raise AssertionError("a file is written")

    monkeypatch.setattr(tempfile, "TemporaryFile", refuse)  # To which a SpooledTemporaryFile moves.
    with pytest.raises(AssertionError, match="a file"), tempfile.SpooledTemporaryFile(max_size=1) as spooled:
        spooled.write(bytes(2))
    monkeypatch.setattr("starlette.formparsers.MultiPartParser.spool_max_size", 1)
    assert client.post("/api/learn", **form()).status_code == 200


def test_one_fit_at_a_time_and_predictions_meanwhile(learner: Any) -> None:
    begun, go = threading.Event(), threading.Event()

    def fit(photos: Photos) -> Any:
        begun.set()
        assert go.wait(30)
        return fit_classifier(learner, photos, made.WAY)

    with client_of(Adapter(fit, made.WAY)) as client, ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, "/api/learn", **form())
        assert begun.wait(30)
        answer = client.post("/api/learn", **form())
        assert "Try again" in refusal(answer, 503)
        assert answer.headers["retry-after"]
        assert client.get("/api").status_code == 200
        go.set()
        assert first.result().status_code == 200
        assert client.post("/api/learn", **form()).status_code == 200


def test_the_classifier_that_is_unused_for_longest_is_dropped(client: Any) -> None:
    one, two = (client.post("/api/learn", **form()).json()["classifier"] for _ in range(2))
    status = lambda identity: client.post(f"/api/predict?classifier={identity}", content=png()).status_code
    assert status(one) == 200
    three = client.post("/api/learn", **form()).json()["classifier"]
    assert [status(each) for each in (one, two, three)] == [200, 404, 200]
    assert len({one, two, three}) == 3
    assert min(map(len, (one, two, three))) >= 20


def test_predictions_from_many_threads_are_those_of_one(client: Any) -> None:
    path = f"/api/predict?classifier={client.post('/api/learn', **form()).json()['classifier']}"
    contents = [png(name, n) for name in made.COLOURS for n in range(4)]
    alone = [client.post(path, content=content).json() for content in contents]
    with ThreadPoolExecutor(6) as pool:
        assert list(pool.map(lambda content: client.post(path, content=content).json(), contents)) == alone


def ask(app: Any, messages: list[Any], path: str = "/api/learn") -> tuple[int, dict[str, Any]]:
    """Sends messages as a server would; after the last one nothing comes."""
    sent: list[Any] = []

    async def receive() -> Any:
        if messages:
            return messages.pop(0)
        await anyio.sleep(30)

    async def send(message: Any) -> None:
        sent.append(message)

    kind = (b"content-type", b"multipart/form-data; boundary=x")
    scope = {
        "type": "http", "http_version": "1.1", "method": "POST", "path": path, "raw_path": path.encode(),
        "query_string": b"", "headers": [kind, (b"content-length", b"5000")], "root_path": "", "scheme": "http",
        "server": ("x", 1), "client": ("x", 1),
    }  # fmt: skip
    anyio.run(app, scope, receive, send)
    return sent[0]["status"], json.loads(sent[1]["body"])


def test_a_body_that_never_comes_or_ends_early_is_refused_and_forgotten(learner: Any) -> None:
    app = create_app(Adapter(lambda photos: fit_classifier(learner, photos, made.WAY), made.WAY), SMALL)
    part = {"type": "http.request", "body": b"--x\r\n", "more_body": True}
    start = time.monotonic()
    assert ask(app, [part])[0] == 408
    assert time.monotonic() - start < 25
    assert ask(app, [part, {"type": "http.disconnect"}])[0] == 400
    with testclient.TestClient(app) as client:
        assert client.post("/api/learn", **form()).status_code == 200


def test_what_arrives_at_one_time_is_limited(learner: Any) -> None:
    """One request holds its bytes while it is fitted; another that would go beyond the limit has to wait."""
    begun, go = threading.Event(), threading.Event()

    def work(pictures: torch.Tensor) -> torch.Tensor:
        begun.set()
        assert go.wait(30)
        return torch.full((len(pictures), 2), 0.5)

    classifier = Classifier(("a", "b"), made.WAY, work)
    limits = Limits(upload_bytes=len(png()) + 10)
    with client_of(classifier, limits) as client, ThreadPoolExecutor() as pool:
        first = pool.submit(client.post, "/api/predict", content=png())
        assert begun.wait(30)
        assert "Too many photos arrive" in refusal(client.post("/api/predict", content=png()), 503)
        go.set()
        assert first.result().status_code == 200
        assert client.post("/api/predict", content=png()).status_code == 200


def test_a_classifier_of_texts_is_refused() -> None:
    texts = Classifier(("a", "b"), TextPreprocessing(None, 9), lambda tokens: tokens)
    with pytest.raises(ArgumentError, match="takes photos"):
        create_app(texts)
