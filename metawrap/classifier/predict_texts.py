"""Names the classes of texts, without metawrap: python predict.py TEXT [TEXT ...]

Needs tokenizers and torch (or, for model.onnx alone, onnxruntime). The files beside this script are the classifier:
classifier.json (classes), tokenizer.json, and network.pt2 or model.onnx.
"""

import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any


def load(folder: Path) -> tuple[list[str], Callable[[list[str]], Any]]:
    """The classes, and a function from texts to probabilities (texts, classes)."""
    from tokenizers import Tokenizer  # Here, because metawrap does without it.

    about = json.loads((folder / "classifier.json").read_text(encoding="utf-8"))
    tokenizer = Tokenizer.from_file(str(folder / "tokenizer.json"))
    if (folder / "network.pt2").exists():
        import torch

        program = torch.export.load(folder / "network.pt2").module()

        def run(tokens: Any) -> Any:
            return program(torch.tensor(tokens)).tolist()
    else:
        import numpy as np
        import onnxruntime

        session = onnxruntime.InferenceSession(folder / "model.onnx")

        def run(tokens: Any) -> Any:
            return session.run(None, {"tokens": np.array(tokens, np.int64)})[0].tolist()

    def probabilities(texts: list[str]) -> Any:
        return [row for text in texts for row in run([_tokens(tokenizer.encode(text))])]

    return about["classes"], probabilities


def _tokens(text: Any) -> list[list[int]]:
    return [text.ids, text.attention_mask]


if __name__ == "__main__":
    if not all(text.strip() for text in sys.argv[1:]) or not sys.argv[1:]:
        sys.exit("usage: python predict.py TEXT [TEXT ...]; no empty ones")
    classes, probabilities = load(Path(__file__).parent)
    for text, row in zip(sys.argv[1:], probabilities(sys.argv[1:]), strict=True):
        best = row.index(max(row))
        print(f"{text}\t{classes[best]}\t{row[best]:.4f}")
