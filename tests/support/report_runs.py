"""Folders of runs, made by hand in the format that docs/report.md describes, with numbers that no two places share."""

from __future__ import annotations

import base64
import io
import json
from pathlib import Path
from typing import Any

from PIL import Image

LAYERS = ("conv0.conv", "conv1.conv", "linear")
STEPS = 3
SETTINGS: dict[str, Any] = {
    "data": "omniglot",
    "ways": 2,
    "shots": 1,
    "targets": 2,
    "method": "maml++",
    "inner_steps": STEPS,
    "epochs": 4,
    "options": {"msl_epochs": 2},
    "seed": 0,
    "device": "cpu",
}


def rate(seed: int, epoch: int, layer: int, step: int, bias: bool = False) -> float:
    """Negative at the last layer's first step from the second epoch on."""
    value = 0.1 + 0.01 * epoch * (layer + 1) - 0.02 * step + 0.001 * seed + 0.0001 * bias
    return round(-0.03 * epoch if layer == 2 and step == 0 and epoch > 1 else value, 6)


def log_line(seed: int, epoch: int) -> dict[str, Any]:
    return {
        "epoch": epoch,
        "iteration": 5 * epoch,
        "train_loss": 1.5 - 0.2 * epoch + 0.05 * seed,
        "train_accuracy": 0.4 + 0.1 * epoch - 0.02 * seed,
        "validation_loss": 1.6 - 0.15 * epoch + 0.03 * seed,
        "validation_accuracy": 0.35 + 0.1 * epoch + 0.04 * seed,
        "validation_interval": 0.05 + 0.001 * epoch,
        "learning_rate": 0.001,
        "skipped_steps": 0,
        "seconds": 2.5 * epoch,
    }


def insight_line(seed: int, epoch: int) -> dict[str, Any]:
    rates = {}
    for number, layer in enumerate(LAYERS):
        rates[f"{layer}.weight"] = [rate(seed, epoch, number, step) for step in range(STEPS)]
        rates[f"{layer}.bias"] = [rate(seed, epoch, number, step, bias=True) for step in range(STEPS)]
    norms = {
        f"conv{layer}.norm": {
            part: {
                name: [round(middle + away + 0.1 * step + 0.01 * epoch, 6) for step in range(STEPS)]
                for name, away in (("low", -0.2), ("median", 0.0), ("high", 0.3))
            }
            for part, middle in (("running_mean", layer), ("running_var", 2.0 + layer), ("weight", 1.0), ("bias", 0.0))
        }
        for layer in (0, 1)
    }
    late = epoch > 2
    return {
        "epoch": epoch,
        "step_weights": [0.0, 0.0, 1.0] if late else [0.3, 0.3, 0.4],
        "step_losses": [None, None, 0.8] if late else [1.3, 1.1, 0.9],
        "rates": rates,
        "norms": norms,
    }


def png(shade: int, size: tuple[int, int] = (4, 3)) -> str:
    file = io.BytesIO()
    Image.new("L", size, shade).save(file, format="PNG")
    return base64.b64encode(file.getvalue()).decode()


def final(seed: int) -> dict[str, Any]:
    episode = {
        "task": 1,
        "why": "the first test task",
        "classes": ["Greek/alpha", "Greek/beta"],
        "support": [{"label": 0, "png": png(10)}, {"label": 1, "png": png(20)}],
        "target": [
            {"label": 0, "png": png(30), "prediction": 0, "probability": 0.9},
            {"label": 0, "png": None, "prediction": 1, "probability": 0.6},
            {"label": 1, "png": png(40), "prediction": 0, "probability": 0.7},
            {"label": 1, "png": None, "prediction": 0, "probability": 0.8},
        ],
        "shares": [0.75, 0.125],
    }
    for place, example in enumerate(episode["support"] + episode["target"]):
        example["at"] = [0.5 * place, 1.0 - place]
    classes = {
        "count": 2,
        "shown": [
            {"class": "Greek/beta", "targets": 8, "right": 2},
            {"class": "Greek/alpha", "targets": 10, "right": 7},
        ],
        "confusions": [
            {"class": "Greek/beta", "taken_for": "Greek/alpha", "times": 6, "targets": 8},
            {"class": "Greek/alpha", "taken_for": "Greek/beta", "times": 3, "targets": 10},
        ],
    }
    steps = [{"steps": k, "accuracy": 0.5 + 0.1 * k + 0.01 * seed, "interval": 0.03 - 0.002 * k} for k in range(4)]
    return {"norm": "batch", "tasks": 60, "steps": steps, "classes": classes, "episodes": [episode]}


def result(seed: int, settings: dict[str, Any]) -> dict[str, Any]:
    score = {"accuracy": 0.812 + 0.01 * seed, "interval": 0.0123}
    norms = {
        "batch": {"before": {"accuracy": 0.5, "interval": 0.01}, "after": score},
        "support": {"before": {"accuracy": 0.45, "interval": 0.02}, "after": {"accuracy": 0.7, "interval": 0.03}},
    }
    return {
        "settings": settings,
        "test": {"tasks": 60, "epoch": 4, "ensemble_epochs": [], "norms": norms},
        "trained_norm": "batch",
        "machine": {"processor": "Abacus 9", "cores": 2},
        "command": "metawrap train --resume",
        "seconds": 61.5,
    }


def make_run(path: Path, seed: int = 0, epochs: int = 4, insight: bool = True, **changes: Any) -> Path:
    """One finished run; without `insight` one of an older version."""
    settings = SETTINGS | changes | {"seed": seed}
    path.mkdir(parents=True)
    command = {"command": "metawrap train --data omniglot --set msl_epochs=2"} if insight else {}
    write(path / "run.json", {"settings": settings, "seeds": None, **command})
    write_lines(path / "log.jsonl", [log_line(seed, epoch) for epoch in range(1, epochs + 1)])
    write(path / "result.json", result(seed, settings))
    if insight:
        write_lines(path / "insight.jsonl", [insight_line(seed, epoch) for epoch in range(1, epochs + 1)])
        write(path / "final_insight.json", final(seed))
    return path


def make_seeds(path: Path, seeds: list[int], **changes: Any) -> Path:
    for seed in seeds:
        make_run(path / f"seed-{seed}", seed, **changes)
    settings = SETTINGS | changes | {"seed": 0}
    write(path / "run.json", {"settings": settings, "seeds": seeds, "command": "metawrap train --seeds 0,1"})
    return path


def write(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content))


def write_lines(path: Path, records: list[Any]) -> None:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))


def spoilt_run(path: Path, text: str) -> Path:
    """A run that holds this text in every place that may hold a text."""
    run = make_run(path, data=text, options={text: text}, method=text)
    content = json.loads((run / "run.json").read_text())
    write(run / "run.json", content | {"command": text})
    insight = final(0) | {"norm": text}
    insight["episodes"][0] |= {"classes": [text, text], "why": text}
    for count in insight["classes"]["shown"] + insight["classes"]["confusions"]:
        count |= {name: text for name in ("class", "taken_for") if name in count}
    insight["episodes"][0]["support"][0]["png"] = text
    write(run / "final_insight.json", insight)
    lines = [insight_line(0, epoch) for epoch in range(1, 5)]
    for line in lines:
        line["rates"] = {f"{text}.weight": [0.1] * STEPS, f"layer.{text}": [0.2] * STEPS}
        line["norms"] = {text: {"weight": {"low": [0.0], "median": [1.0], "high": [2.0]}}}
    write_lines(run / "insight.jsonl", lines)
    told = result(0, SETTINGS) | {"machine": {text: text}, "trained_norm": text}
    told["test"]["norms"][text] = told["test"]["norms"]["batch"]
    write(run / "result.json", told)
    return run
