"""`metawrap serve`: its sources, its address, and what it refuses."""

from __future__ import annotations

import builtins
import json
import socket
import sys
from pathlib import Path
from typing import Any

import photos as made
import pytest
from test_service import png, testclient

from metawrap.cli import main, serve
from metawrap.cli.arguments import build_parser
from metawrap.service import create_app
from metawrap.training import RunSettings, train

NETWORK = """
import photos

def build(ways=3):
    network = photos.network(ways)
    network.preprocessing = photos.WAY
    return network
"""


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("serve")
    made.folder(folder / "photos", 2)
    (folder / "networks_to_serve.py").write_text(NETWORK)
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(folder)
        patch.syspath_prepend(str(folder))
        yield folder


def app_of(*words: str) -> Any:
    return create_app(serve._served(build_parser().parse_args(["serve", *words])))


def learned(client: Any, names: list[str]) -> Any:
    files = [(str(k), (f"{n}.png", png(name, n))) for k, name in enumerate(names) for n in range(2)]
    return client.post("/api/learn", data={"classes": json.dumps(names)}, files=files)


@pytest.mark.parametrize("method", ["auto", "simpleshot", "fine-tune"])
def test_a_network_learns_any_number_of_classes(place: Path, method: str) -> None:
    with testclient.TestClient(app_of("networks_to_serve:build", "--method", method)) as client:
        assert "networks_to_serve:build" in client.get("/api").json()["network"]
        for names in (["red", "blue"], ["red", "blue", "green"]):
            answer = learned(client, names)
            assert answer.status_code == 200, answer.text
            identity = answer.json()["classifier"]
            found = client.post(f"/api/predict?classifier={identity}", content=png("blue", 9)).json()["classes"]
            assert {each["name"] for each in found} == set(names)
            if method != "fine-tune":
                assert found[0]["name"] == "blue"


def test_a_run_learns_as_many_classes_as_it_has_outputs(place: Path) -> None:
    settings = RunSettings(
        method="maml", filters=4, image_size=28, ways=2, epochs=1, iterations_per_epoch=1, tasks_per_batch=1,
        validation_tasks=2, test_tasks=2, inner_steps=1,
    )  # fmt: skip
    train(settings, place / "run")
    with testclient.TestClient(app_of("run", "--checkpoint", "1")) as client:
        assert learned(client, ["red", "blue"]).json()["method"] == "MAML"
        answer = learned(client, ["red", "blue", "green"])
        assert answer.status_code == 400
        assert "outputs" in answer.json()["error"] or "classes" in answer.json()["error"]


def test_a_classifier_is_served_over_a_socket(
    place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert main(["adapt", "networks_to_serve:build", "--support", "photos", "--method", "protonet"]) == 0
    capsys.readouterr()
    answers: list[Any] = []

    def run(self: Any, sockets: list[socket.socket]) -> None:
        answers.extend([self.config.app, sockets[0].getsockname()])

    monkeypatch.setattr("uvicorn.Server.run", run)
    assert main(["serve", "clf", "--port", "0"]) == 0
    app, (host, port) = answers
    said = capsys.readouterr().out
    assert "clf, 3 classes" in said
    assert f"http://{host}:{port}/" in said
    assert host == "127.0.0.1"
    with testclient.TestClient(app) as client:
        assert client.post("/api/predict", content=png("green", 9)).json()["classes"][0]["name"] == "green"
    assert main(["serve", "clf", "--method", "r2d2"]) == 2
    assert "Leave --method out" in capsys.readouterr().err


def test_wrong_arguments_are_one_line(place: Path, capsys: pytest.CaptureFixture[str]) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        for words, said in {
            f"--port {port}": f"cannot listen on 127.0.0.1, port {port}", "--port 70000": "expected 0 to 65535",
            "--host no.such.host.invalid": "cannot listen on no.such.host.invalid", "--port 0": "is a folder without",
        }.items():  # fmt: skip
            assert main(["serve", "photos", *words.split()]) == 2
            assert said in capsys.readouterr().err


def test_a_missing_library_is_named(place: Path, capsys: pytest.CaptureFixture[str], monkeypatch: Any) -> None:
    real = builtins.__import__

    def without(name: str, *rest: Any) -> Any:
        if name.startswith("fastapi"):
            raise ImportError(name)
        return real(name, *rest)

    for name in [each for each in sys.modules if each.startswith("metawrap.service")]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setattr(builtins, "__import__", without)
    assert main(["serve", "photos"]) == 2
    assert 'pip install "metawrap[serve]"' in capsys.readouterr().err
