"""Values in errors: in one line, of bounded length, whatever was handed in."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from models import NormedMlp, class_tasks

from metawrap import ANIL, FineTune, MAMLPlusPlus, MetaWrapError, ProtoNet, Task
from metawrap.data import splits_from
from metawrap.errors import shown
from metawrap.sklearn import FewShotClassifier

LARGE: dict[str, Any] = {
    "array": np.random.default_rng(0).random((60, 50)),
    "tensor": torch.rand(60, 50),
    "list": list(range(5000)),
    "dict": {"values": np.arange(5000)},
    "text": "line\n" * 2000,
}
X, Y = (part[0] for part in class_tasks((4,), shots=2)[:2])


class Network(NormedMlp):
    """In double precision."""

    def __init__(self) -> None:
        super().__init__()
        self.double()


@pytest.mark.parametrize("value", LARGE)
@pytest.mark.parametrize(
    "call",
    [
        lambda value: MAMLPlusPlus(Network()).adapt(X, Y, task_id=value),
        lambda value: Task(X, value, X, Y, classes=value),
        lambda value: MAMLPlusPlus(Network(), inner_lr=value),
        lambda value: MAMLPlusPlus(Network(), outputs=value),
        lambda value: MAMLPlusPlus(Network(), outer_update={"max_grad_norm": value}),
        lambda value: MAMLPlusPlus(Network(), loss_fn=value),
        lambda value: MAMLPlusPlus(Network(), head=value),
        lambda value: MAMLPlusPlus(Network()).evaluate(value),
        lambda value: MAMLPlusPlus(Network()).evaluate([Task(X, Y, X, Y)], metric=lambda found, y: value),
        lambda value: MAMLPlusPlus(Network()).adapt(X, Y, steps=value),
        lambda value: setattr(MAMLPlusPlus(Network()), "epoch", value),
        lambda value: ProtoNet(Network(), embedding=value),
        lambda value: ProtoNet(Network()).adapt(X, Y, steps=value),
        lambda value: ANIL(Network(), embedding=value),
        lambda value: FineTune(Network(), classes=value),
        lambda value: FewShotClassifier(value).fit(X.numpy(), Y.numpy()),
        lambda value: FewShotClassifier(ProtoNet(Network()), input_shape=value).fit(X.numpy(), Y.numpy()),
        lambda value: splits_from(value),
    ],
)
def test_an_error_shows_no_whole_array(call: Callable[[Any], Any], value: str) -> None:
    with pytest.raises((MetaWrapError, TypeError)) as refused:
        call(LARGE[value])
    assert len(str(refused.value)) < 800
    assert "\n" not in str(refused.value)


def test_labels_of_a_thousand_classes_are_not_listed() -> None:
    x, y = torch.rand(3000, 4).double(), torch.arange(3000) * 2
    with pytest.raises(MetaWrapError, match=r"it holds a list of 3000: 0, 2, 4, .*, \.\.\.\. Relabel"):
        ProtoNet(Network()).adapt(x, y)


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (np.zeros((2, 3), np.float32), "a float32 ndarray of shape (2, 3)"),
        (torch.zeros(()), "a torch.float32 tensor of shape ()"),
        (np.float64(0.5), "np.float64(0.5)"),
        ("a\nb", r"'a\nb'"),
        ((1, 2), "(1, 2)"),
        (None, "None"),
    ],
)
def test_what_a_value_is_shown_as(value: Any, words: str) -> None:
    assert shown(value) == words
