"""Rows of support and target sets: they run as one batch only where no row of it depends on another.

The oracle is the same network with one more input, which it ignores and whose dtype differs between the two sets: these
can run in no other way than apart.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch
from models import seeded
from torch import Tensor, nn

from metawrap import Reptile, Task, TaskError, methods
from metawrap.training.run_settings import METHODS

NODES = 9


class Net(nn.Module):
    """Linear, batch norm, a way of its own to mix rows, and a head. apart: takes the mark that keeps sets apart."""

    def __init__(self, mix: Callable[..., Tensor] | None, apart: bool = False) -> None:
        super().__init__()
        self.first, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 3)
        self.gate = nn.Parameter(torch.ones(()))
        self.mix, self.apart = mix, apart

    def forward(self, x: Tensor, *rest: Tensor) -> Tensor:
        hidden = torch.tanh(self.norm(self.first(x)))
        rest = rest[:-1] if self.apart else rest
        mixed = hidden if self.mix is None else self.mix(self, hidden, *rest)
        return self.head(mixed + 0 * self.gate)  # type: ignore[no-any-return]


def edges(net: Net, hidden: Tensor, ends: Tensor) -> Tensor:
    return hidden + torch.zeros_like(hidden).index_add(0, ends[:, 1].long(), hidden[ends[:, 0].long()])


def sets(net: Net, hidden: Tensor, of_set: Tensor) -> Tensor:
    """Each point less the mean of its set."""
    member = nn.functional.one_hot(of_set.long(), 3).to(hidden.dtype)
    return hidden - member @ (member.T @ hidden / member.sum(0)[:, None].clamp(min=1))


def centred(net: Net, hidden: Tensor) -> Tensor:
    return hidden - net.gate * hidden.mean(0)


def centred_in_training(net: Net, hidden: Tensor) -> Tensor:
    return hidden - hidden.mean(0).detach() if net.training else hidden


def mixed_up(net: Net, hidden: Tensor) -> Tensor:
    return 0.7 * hidden + 0.3 * hidden.flip(0)


def sequence(net: Net, hidden: Tensor) -> Tensor:
    return hidden.cumsum(0)


def attended(net: Net, hidden: Tensor) -> Tensor:
    return hidden + torch.softmax(hidden @ hidden.T, 1) @ hidden


def numbers(seed: int, *shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def places(seed: int, high: int, *shape: int) -> Tensor:
    return torch.randint(0, high, shape, generator=torch.Generator().manual_seed(seed))


LABELS = torch.arange(NODES) % 3
X = numbers(0, NODES, 4), numbers(1, NODES, 4)
ENDS = places(2, NODES, NODES, 2), places(3, NODES, NODES, 2)
MEMBERS = places(4, 3, NODES), places(5, 3, NODES)
FALLING = torch.linspace(1, 0.1, NODES, dtype=torch.float64)  # The largest number of both sets is the same.
MIXED: dict[str, tuple[Any, tuple[Any, Any]]] = {
    "edges": (edges, ENDS),
    "edges as floats": (edges, (ENDS[0].double(), ENDS[1].double())),
    "point sets": (sets, MEMBERS),
    "point sets as floats": (sets, (MEMBERS[0].double(), MEMBERS[1].double())),
    "centred": (centred, (None, None)),
    "centred in training, detached": (centred_in_training, (None, None)),
    "pairs": (mixed_up, (None, None)),
    "sequence": (sequence, (None, None)),
    "attended": (attended, (None, None)),
    "scaled by the largest": (lambda net, hidden, w: hidden * (w / w.amax())[:, None], (FALLING, FALLING)),
}
NAMES = {"multi-task": {"id": "blue"}, "fine-tune by classes": {"classes": (0, 1, 2)}}
EMBEDDING = [
    "protonet",
    "simpleshot",
    "r2d2",
    "logistic",
    "metaoptnet",
    "matchingnet",
    "relationnet",
    "siamese",
    "mann",
    "metanet",
]
EMBEDDING += ["memorymodule", "anil", "fine-tune", "multi-task"]


def task(rest: tuple[Any, Any] = (None, None), apart: bool = False, **names: Any) -> Task:
    marks = (torch.zeros(NODES, dtype=torch.float32), torch.zeros(NODES, dtype=torch.float64))
    inputs = [
        tuple(part for part in (x, other, mark if apart else None) if part is not None)
        for x, other, mark in zip(X, rest, marks, strict=True)
    ]
    return Task(inputs[0], LABELS, inputs[1], LABELS, **names)


def made(method: str, mix: Any, apart: bool = False) -> Any:
    torch.manual_seed(0)
    kind = getattr(methods, METHODS[method.split(" ")[0]])
    still = lambda p: torch.optim.SGD(p, lr=0.0)
    own = {"classes": "shared"} if method == "fine-tune" else {}
    return kind(seeded(lambda: Net(mix, apart)), head="head", norm="running", optimizer=still, **own)


def losses(method: str, mix: Any, *rest: Any, apart: bool = False) -> list[float]:
    learner = made(method, mix, apart)
    return [learner.meta_step([task(each, apart, **NAMES.get(method, {}))]).loss for each in rest]


@pytest.mark.sampled(9)
@pytest.mark.parametrize("method", [*EMBEDDING, "fine-tune by classes"])
@pytest.mark.parametrize("mixed", ["edges", "centred"])
def test_every_method_trains_on_sets_whose_rows_do_not_mix(method: str, mixed: str) -> None:
    mix, rest = MIXED[mixed]
    assert losses(method, mix, rest) == pytest.approx(losses(method, mix, rest, apart=True), rel=1e-9)


@pytest.mark.sampled(10)
@pytest.mark.parametrize("mixed", MIXED)
@pytest.mark.parametrize("method", ["protonet", "fine-tune"])
def test_whatever_mixes_rows_keeps_the_sets_apart(method: str, mixed: str) -> None:
    mix, rest = MIXED[mixed]
    assert losses(method, mix, rest) == pytest.approx(losses(method, mix, rest, apart=True), rel=1e-9)


def test_a_graph_network_has_the_loss_that_numpy_computes() -> None:
    model: Any = seeded(lambda: Net(edges))

    def embedded(x: Tensor, ends: Tensor) -> np.ndarray:
        first = x.numpy() @ model.first.weight.detach().numpy().T + model.first.bias.detach().numpy()
        normed = (first - first.mean(0)) / np.sqrt(first.var(0) + model.norm.eps)
        hidden = np.tanh(normed * model.norm.weight.detach().numpy() + model.norm.bias.detach().numpy())
        found = hidden.copy()
        for source, end in ends.tolist():
            found[end] += hidden[source]
        return found

    support, target = (embedded(x, ends) for x, ends in zip(X, ENDS, strict=True))
    prototypes = np.stack([support[LABELS.numpy() == way].mean(0) for way in range(3)])
    logits = -((target[:, None] - prototypes) ** 2).sum(-1)
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    expected = -np.log(shares[np.arange(NODES), LABELS.numpy()]).mean()
    assert losses("protonet", edges, ENDS)[0] == pytest.approx(expected, rel=1e-9)


def test_a_first_task_that_shows_nothing_decides_nothing() -> None:
    none, equal = torch.zeros(NODES, 2).long(), (None, None)
    both = [losses("protonet", edges, (none, none), ENDS, apart=apart) for apart in (False, True)]
    assert both[0] == pytest.approx(both[1], rel=1e-9)
    found = []
    for apart in (False, True):
        learner, given = made("protonet", centred, apart), task(equal, apart)
        learner.model.gate.data.zero_()
        learner.meta_step([Task(given.support_x, LABELS, given.support_x, LABELS)])
        learner.model.gate.data.fill_(0.5)
        found.append(learner.meta_step([given]).loss)
    assert found[0] == pytest.approx(found[1], rel=1e-9)


def path_dropped(net: Net, hidden: Tensor) -> Tensor:
    return hidden * hidden.new_empty(len(hidden), 1).bernoulli_(0.8) / 0.8 if net.training else hidden


def dropped_out(net: Net, hidden: Tensor) -> Tensor:
    return nn.functional.dropout(hidden, 0.5, net.training)


@pytest.mark.parametrize("mix", [None, path_dropped, dropped_out])
def test_rows_that_do_not_mix_are_one_batch_whose_statistics_are_stored(mix: Any) -> None:
    learner = made("protonet", mix)
    state = torch.get_rng_state()
    learner.meta_step([task()])
    first = (torch.cat(X) @ learner.model.first.weight.T + learner.model.first.bias).detach().numpy()
    np.testing.assert_allclose(learner.model.norm.running_mean.numpy(), 0.1 * first.mean(0), rtol=1e-9)
    assert torch.equal(torch.get_rng_state(), state) == (mix is None)


def test_a_head_that_centres_its_rows_sees_one_set_at_a_time() -> None:
    class Centred(nn.Linear):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x - x.mean(0))

    model: Any = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), Centred(6, 3)).double()
    with torch.no_grad():
        logits = torch.cat([model(x) for x in X])
    expected = float(nn.functional.cross_entropy(logits, LABELS.repeat(2)))
    found = methods.MultiTask(model).meta_step([Task(X[0], LABELS, X[1], LABELS, id="blue")]).loss
    assert found == pytest.approx(expected, rel=1e-9)


DRAWN = {"drawn around a mean": (lambda net, hidden: torch.normal(hidden - hidden.mean(0), 1.0), (None, None))}


@pytest.mark.sampled(5)
@pytest.mark.parametrize("mixed", MIXED | DRAWN)
def test_reptile_refuses_rows_that_are_no_examples_and_nothing_moves(mixed: str) -> None:
    mix, rest = (MIXED | DRAWN)[mixed]
    learner = Reptile(seeded(lambda: Net(mix)), inner_steps=1, engine="functional")
    before = copy.deepcopy(learner.state_dict())
    with pytest.raises(TaskError, match=r"support_x: Reptile draws.*Use FOMAML or MAML"):
        learner.meta_step([task(rest)])
    torch.testing.assert_close(
        {k: v for k, v in learner.state_dict().items() if isinstance(v, Tensor)},
        {k: v for k, v in before.items() if isinstance(v, Tensor)},
        rtol=0,
        atol=0,
    )
    for advised in (methods.FOMAML, methods.MAML):
        assert advised(seeded(lambda: Net(mix)), inner_steps=1).meta_step([task(rest)]).loss > 0


def drawn(net: Net, hidden: Tensor) -> Tensor:
    counts = torch.poisson(hidden.exp()) * torch.bernoulli(hidden.sigmoid()) + torch.multinomial(hidden.softmax(1), 1)
    return nn.functional.rrelu(hidden, training=True) * counts + torch.normal(hidden, 1.0)


@pytest.mark.parametrize("mix", [None, path_dropped, dropped_out, drawn])
@pytest.mark.parametrize("tracks", [True, False])
def test_reptile_takes_rows_that_only_share_the_moments_of_batch_norms(mix: Any, tracks: bool) -> None:
    model: Any = seeded(lambda: Net(mix))
    model.norm = nn.BatchNorm1d(6, track_running_stats=tracks).double()
    learner = Reptile(model, inner_steps=1, engine="functional")
    assert learner.meta_step([task()]).loss > 0


def test_reptile_takes_outputs_of_a_class_of_the_users_own() -> None:
    class Objects(Net):
        def forward(self, x: Tensor) -> Any:
            return SimpleNamespace(scores=super().forward(x))

    losses = [
        Reptile(seeded(lambda kind=kind: kind(None)), inner_steps=1, engine="functional", loss_fn=loss_fn)
        .meta_step([task()])
        .loss
        for kind, loss_fn in (
            (Objects, lambda found, y: nn.functional.cross_entropy(found.scores, y)),
            (Net, nn.functional.cross_entropy),
        )
    ]
    assert losses[0] == pytest.approx(losses[1], rel=1e-12)
