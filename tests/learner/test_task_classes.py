"""`adapt(..., classes=)`: a plain module whose outputs are those of the task's classes; and networks with too many."""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from face import unchanged
from many_outputs import logits_of
from models import NormedMlp, class_tasks, seeded
from torch import Tensor, nn
from torch.nn.utils.parametrizations import weight_norm

from metawrap import (
    ANIL,
    FOMAML,
    MAML,
    R2D2,
    ArgumentError,
    FineTune,
    MAMLPlusPlus,
    MetaWrapWarning,
    MultiTask,
    ProtoNet,
    Reptile,
    Task,
    TaskError,
    UnsupportedModuleError,
    ZeroStep,
)

X, PLACES, TARGET_X, _ = (part[0] for part in class_tasks((4,), shots=2))
LABELS = (1, 4, 6)
Y = torch.tensor(LABELS)[PLACES]
NAMES = {"owl": 4, "cat": 1, "elk": 6}
OWN_HEAD: list[Any] = [
    MAMLPlusPlus,
    partial(FOMAML, norm="support"),
    partial(Reptile, norm="support", evaluation_steps=2),
    partial(ANIL, norm="support"),
    partial(FineTune, inner_steps=3),
    partial(MultiTask, inner_steps=3),
    ZeroStep,
]


def named(y: Tensor) -> list[str]:
    names = {label: name for name, label in NAMES.items()}
    return [names[label] for label in y.tolist()]


@pytest.mark.parametrize("method", OWN_HEAD)
def test_the_adapted_module_has_the_outputs_of_the_classes_alone(method: Any) -> None:
    learner = method(seeded(lambda: NormedMlp(ways=9)))
    whole = learner.adapt(X, Y)(TARGET_X).detach()
    ways: list[tuple[Any, Any, list[int]]] = [
        (Y, LABELS, [1, 4, 6]),
        (Y.tolist(), torch.tensor(LABELS), [1, 4, 6]),
        (Y, range(7), [0, 1, 2, 3, 4, 5, 6]),  # A class without an example has the output that was learned.
        (Y, NAMES, [4, 1, 6]),
        (named(Y), NAMES, [4, 1, 6]),
        (np.array(named(Y)), NAMES, [4, 1, 6]),
    ]
    with unchanged(learner):
        for y, classes, columns in ways:
            adapted = learner.adapt(X, y, classes=classes)
            assert type(adapted) is NormedMlp
            assert (adapted.linear.out_features, tuple(adapted.state_dict()["linear.weight"].shape)) == (
                len(columns),
                (len(columns), 6),
            )
            again = pickle.loads(pickle.dumps(adapted))(TARGET_X)
            torch.testing.assert_close(again.detach(), whole[:, columns], rtol=1e-12, atol=0)
    first = learner.adapt(X, PLACES)(TARGET_X)
    for y in (PLACES, [["a", "b", "c"][place] for place in PLACES]):
        found = learner.adapt(X, y, classes=("a", "b", "c"))(TARGET_X)
        torch.testing.assert_close(found, first[:, :3], rtol=1e-12, atol=0)


@pytest.mark.parametrize("method", [ProtoNet, R2D2])
def test_a_fitted_head_has_its_outputs_in_the_order_of_the_classes(method: Any) -> None:
    learner = method(seeded(NormedMlp))
    expected = learner.adapt(X, PLACES)(TARGET_X)
    for y, classes, columns in ((Y, LABELS, [0, 1, 2]), (named(Y), NAMES, [1, 0, 2]), (PLACES, list("abc"), [0, 1, 2])):
        torch.testing.assert_close(learner.adapt(X, y, classes=classes)(TARGET_X), expected[:, columns])


class Ends(nn.Module):
    """A network with an end of its own behind a layer of seven outputs; it edits its input."""

    def __init__(self, head: nn.Module, end: Callable[[Any, Tensor], Any]) -> None:
        super().__init__()
        self.body, self.head, self.end = nn.Linear(4, 6), head, end
        self.register_buffer("scale", torch.ones(7))

    def forward(self, x: Tensor) -> Any:
        return self.end(self, self.body(x.mul_(0.5)).tanh())


LINEAR = partial(nn.Linear, 6, 7)
ENDS: dict[str, tuple[Callable[[], nn.Module], Any, Callable[[Tensor], Tensor]]] = {
    "a temperature": (LINEAR, lambda m, h: m.head(h) / 3, lambda p: p),
    "log_softmax": (LINEAR, lambda m, h: m.head(h).log_softmax(1), lambda p: p.log_softmax(1)),
    "softmax": (LINEAR, lambda m, h: m.head(h).softmax(1), lambda p: p / p.sum(1, keepdim=True)),
    "a map, then its mean": (
        partial(nn.Conv1d, 6, 7, 1),
        lambda m, h: m.head(h[..., None].repeat(1, 1, 2)).mean(2),
        lambda p: p,
    ),
    "features beside them": (LINEAR, lambda m, h: {"logits": m.head(h), "features": h}, lambda p: p),
    "dropout in eval mode": (LINEAR, lambda m, h: m.head(F.dropout(h)), lambda p: p),
}
REFUSED: dict[str, tuple[Callable[[], nn.Module], Any, str]] = {
    "a scale for each output": (LINEAR, lambda m, h: m.head(h) * m.scale, "fails"),
    "weight_norm": (lambda: weight_norm(nn.Linear(6, 7)), lambda m, h: m.head(h), "not made by the rows"),
    "another order": (LINEAR, lambda m, h: m.head(h).flip(1), "not made by the rows"),
    "two tensors": (LINEAR, lambda m, h: (m.head(h), m.head(h)), "not known which tensor"),
}


def ending(head: Callable[[], nn.Module], end: Any) -> Any:
    loss = lambda p, y: F.cross_entropy(p[0] if isinstance(p, tuple) else logits_of(p), y)
    torch.manual_seed(0)
    return MAML(Ends(head(), end).double(), inner_steps=1, loss_fn=loss)


@pytest.mark.parametrize("name", ENDS)
def test_whatever_the_end_of_the_network_makes_of_its_outputs(name: str) -> None:
    head, end, share = ENDS[name]
    learner = ending(head, end)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        learner.adapt(X, Y)
        after = torch.rand(())
        torch.manual_seed(1)
        kept = X.clone()
        adapted = learner.adapt(X, Y, classes=LABELS)
        assert torch.equal(torch.rand(()), after)
        assert torch.equal(X, kept)
        torch.manual_seed(1)
        whole = learner.adapt(X, Y)
        expected, found = [
            (torch.manual_seed(2), logits_of(module(TARGET_X.clone())))[1] for module in (whole, adapted)
        ]
    torch.testing.assert_close(found, share(expected[:, list(LABELS)]), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", REFUSED)
def test_outputs_that_cannot_be_cut_off_are_refused_and_can_be_selected(name: str) -> None:
    head, end, words = REFUSED[name]
    learner = ending(head, end)
    with pytest.raises(UnsupportedModuleError, match=rf"classes: Ends cannot be cut down.*{words}.*\[:, labels\]"):
        learner.adapt(X, Y, classes=LABELS)
    prediction = learner.adapt(X, Y)(TARGET_X.clone())
    assert name == "two tensors" or prediction[:, LABELS].shape == (len(TARGET_X), 3)
    # Nothing is cut off where all outputs are the task's: then names are all that was asked for.
    if name != "two tensors":
        assert learner.adapt(X, Y, classes=range(7))(TARGET_X.clone()).shape[1] == 7


@pytest.mark.parametrize(
    ("y", "classes", "error", "words"),
    [
        *((Y, bad, ArgumentError, "classes: expected different whole numbers") for bad in ([4, 1, 6], [1, 1], [-1, 4])),
        *((Y, bad, ArgumentError, "classes: expected .*names") for bad in ("abc", 5, [], {}, {1: 2}, ["a", 1], [[1]])),
        *((Y, bad, ArgumentError, "classes: ") for bad in (["a", "a"], {"a": 1, "b": 1}, [True], [0.5], {"a": "b"})),
        (PLACES, (12, 57, 80), TaskError, r"labels \[0, 1, 2\], but classes= has \[12, 57, 80\].*pass strings"),
        (named(Y), {"owl": 4, "cat": 1}, TaskError, "support_y holds 'elk', which is not in"),
        (X, LABELS, TaskError, "support_y: expected whole numbers as labels"),
        (Y, range(12), ArgumentError, "classes: expected labels below 9, the outputs, but got 11"),
    ],
)
def test_classes_that_do_not_fit_are_refused(y: Any, classes: Any, error: type, words: str) -> None:
    learner = FOMAML(seeded(lambda: NormedMlp(ways=9)), inner_steps=1)
    with pytest.raises(error, match=words):
        learner.adapt(X, y, classes=classes)


def test_of_a_thousand_outputs_five_keep_all_of_the_probability() -> None:
    learner = MAMLPlusPlus(seeded(lambda: NormedMlp(ways=1000)))
    modules = [learner.adapt(X, PLACES, classes=classes) for classes in (None, range(3))]
    shares = [float(module(X).detach().softmax(1)[:, :3].sum(1).mean()) for module in modules]
    assert shares[0] < 0.7
    assert shares[1] == pytest.approx(1)


class Named(NormedMlp):
    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x)}


def told(method: Any, count: int, y: Tensor, kind: Any = NormedMlp, **options: Any) -> list[str]:
    """The warnings of two meta-steps."""
    learner = method(seeded(lambda: kind(ways=count)), **options)
    with warnings.catch_warnings(record=True) as seen:
        warnings.simplefilter("always", MetaWrapWarning)
        for _ in range(2):
            learner.meta_step([Task(X[: len(y)], y, X[: len(y)], y)])
    return [str(each.message) for each in seen if "outputs" in str(each.message)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("method", [MAMLPlusPlus, FOMAML, Reptile, ANIL])
@pytest.mark.parametrize("outputs", [1000, 6, 4])
def test_outputs_of_no_class_are_told_once_and_what_is_told_helps(method: Any, outputs: int) -> None:
    [text] = told(method, outputs, PLACES)
    assert text.startswith(f"The network has {outputs} outputs, but its first task has 3 classes")
    assert "Give the network 3 outputs" in text
    assert told(method, 3, PLACES) == []
    assert told(method, outputs, PLACES, Named) == [text]
    assert ('outputs={"mask_unused_outputs": True}' in text) == (method is not ANIL)
    if method is not ANIL:
        assert told(method, outputs, PLACES, outputs={"mask_unused_outputs": True}) == []
    assert "adapt(..., classes=range(3))" in text
    assert method(seeded(lambda: NormedMlp(ways=outputs))).adapt(X, PLACES, classes=range(3))(X).shape[1] == 3


def test_a_mask_is_not_advised_where_it_would_be_refused() -> None:
    [smoothed] = told(FOMAML, 9, PLACES, loss_fn=nn.CrossEntropyLoss(label_smoothing=0.1))
    [batched] = told(MAML, 9, PLACES, engine="batched")
    [margins] = told(FOMAML, 9, PLACES, loss_fn=F.multi_margin_loss)
    assert not any("mask" in text for text in (smoothed, batched, margins))


FINE: dict[str, tuple[Any, int, Any, dict[str, Any]]] = {
    "as many as classes": (MAML, 3, PLACES, {}),
    "labels among all classes": (MAML, 9, Y, {}),
    "a class that happens to be missing": (MAML, 4, torch.tensor([0, 1, 1, 2, 0, 0]), {}),
    "one class": (MAML, 2, torch.zeros(6).long(), {}),
    "trained on all classes": (FineTune, 9, PLACES, {"classes": "shared"}),
    "a loss that may be of anything": (MAML, 9, PLACES, {"loss_fn": lambda p, y: p.square().mean()}),
    "a head of its own": (ProtoNet, 9, PLACES, {}),
}


@pytest.mark.parametrize("name", FINE)
def test_common_use_is_not_told(name: str) -> None:
    method, outputs, y, options = FINE[name]
    assert told(method, outputs, y, **options) == []
