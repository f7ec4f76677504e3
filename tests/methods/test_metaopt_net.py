"""MetaOptNet against scikit-learn, the conditions of optimality in numpy, and derivatives by differences."""

from __future__ import annotations

import sys
import warnings

import numpy as np
import pytest
import torch
from by_hand import LABELS, embedded, mlp, one_hot, prediction, task_with
from sklearn.svm import LinearSVC
from torch import Tensor, nn

from metawrap import ArgumentError, MetaOptNet, MetaWrapError
from metawrap.heads import multiclass_svm as module
from metawrap.heads.multiclass_svm import multiclass_svm


def points(examples: int, numbers: int, labels: Tensor, distance: float = 1.0, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    centres = distance * torch.randn(int(labels.max()) + 1, numbers, generator=generator, dtype=torch.float64)
    return centres[labels] + torch.randn(examples, numbers, generator=generator, dtype=torch.float64)


def svm(x: Tensor, labels: Tensor, c: float) -> Tensor:
    return multiclass_svm(x, nn.functional.one_hot(labels).to(x.dtype), c)


def primal(x: np.ndarray, y: np.ndarray, c: float, weights: np.ndarray) -> float:
    scores = x @ weights
    hinge = (scores + 1 - y).max(1) - (scores * y).sum(1)
    return float((weights**2).sum() / 2 + c * hinge.sum())


# Separable; not separable, with more examples than numbers; more numbers than examples, with few free entries.
CASES = [(9, 4, 3.0, 10.0), (40, 3, 0.5, 0.1), (12, 30, 0.2, 0.02), (15, 15, 1.0, 0.05)]


@pytest.mark.parametrize(("examples", "numbers", "distance", "c"), CASES)
def test_the_weights_are_those_of_scikit_learn(examples: int, numbers: int, distance: float, c: float) -> None:
    labels = torch.arange(examples) % 3
    x = points(examples, numbers, labels, distance)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        other = LinearSVC(multi_class="crammer_singer", fit_intercept=False, C=c, tol=1e-10, max_iter=1_000_000)
        other.fit(x.numpy(), labels.numpy())
    found = svm(x, labels, c).numpy()
    np.testing.assert_allclose(x.numpy() @ found, other.decision_function(x.numpy()), atol=1e-5)
    y = one_hot(labels)
    assert primal(x.numpy(), y, c, found) <= primal(x.numpy(), y, c, other.coef_.T) + 1e-9


def test_of_two_classes_it_is_the_binary_svm() -> None:
    labels = torch.arange(20) % 2
    x = points(20, 6, labels, 0.5)
    other = LinearSVC(loss="hinge", fit_intercept=False, C=2 * 0.3, tol=1e-10, max_iter=1_000_000)
    other.fit(x.numpy(), labels.numpy())
    found = svm(x, labels, 0.3).numpy()
    np.testing.assert_allclose(x.numpy() @ (found[:, 1] - found[:, 0]), other.decision_function(x.numpy()), atol=1e-5)


@pytest.mark.parametrize("c", [0.005, 0.05, 5.0])
def test_the_weights_fulfil_the_conditions_of_optimality(c: float) -> None:
    labels = torch.arange(12) % 4
    x = points(12, 20, labels, 0.5)
    weights, y = svm(x, labels, c).numpy(), one_hot(labels)
    dual = np.linalg.lstsq(x.numpy().T, weights, rcond=None)[0]  # Unique: the examples are independent.
    np.testing.assert_allclose(x.numpy().T @ dual, weights, atol=1e-10)
    np.testing.assert_allclose(dual.sum(1), 0, atol=1e-10)
    assert (dual <= c * y + 1e-10).all()
    lower = (dual * y).sum() - (weights**2).sum() / 2
    assert primal(x.numpy(), y, c, weights) == pytest.approx(lower, abs=1e-9)


@pytest.mark.parametrize(
    ("examples", "numbers", "distance", "c"), [(6, 4, 1.0, 10.0), (8, 3, 0.5, 0.1), (6, 9, 0.2, 0.02)]
)
def test_the_derivative_is_that_of_differences(examples: int, numbers: int, distance: float, c: float) -> None:
    labels = torch.arange(examples) % 3
    x = points(examples, numbers, labels, distance).requires_grad_()
    assert torch.autograd.gradcheck(lambda x: svm(x, labels, c), (x,), atol=1e-6, rtol=1e-5)


@pytest.mark.parametrize("factor", [1e-3, 1e3])
def test_the_size_of_embeddings_is_only_a_unit(factor: float) -> None:
    labels = torch.arange(8) % 3
    x = points(8, 5, labels)
    expected = svm(x, labels, 0.1)
    found = factor * svm(factor * x, labels, 0.1 / factor**2)
    np.testing.assert_allclose(found.numpy(), expected.numpy(), atol=1e-9)


def test_repeated_examples_count_as_often_as_they_come() -> None:
    labels = torch.arange(6) % 3
    x = points(6, 4, labels, 0.3).requires_grad_()
    once = svm(x, labels, 0.2)
    twice = svm(torch.cat([x, x]), torch.cat([labels, labels]), 0.1)
    np.testing.assert_allclose(twice.detach().numpy(), once.detach().numpy(), atol=1e-8)
    (gradient,) = torch.autograd.grad(twice.square().sum(), x)
    assert torch.isfinite(gradient).all()


def test_a_solution_that_is_none_is_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    labels = torch.arange(9) % 3
    near = module._near
    monkeypatch.setattr(module, "_near", lambda *a: near(*a)._replace(free=torch.ones(9, 3, dtype=torch.bool)))
    assert torch.isfinite(svm(points(9, 12, labels, 9.0), labels, 1e6)).all()  # Where no bound holds, that is true.
    with pytest.raises(MetaWrapError, match=r"9 examples could not be solved.*solver=\"ridge\""):
        svm(points(9, 12, labels, 0.1), labels, 0.01)


@pytest.mark.parametrize("seed", range(8))
def test_it_holds_for_kernels_of_low_rank_repeated_examples_and_any_size(seed: int) -> None:
    labels = torch.arange(15) % 5
    x = points(15, 8, labels, 0.5, seed=seed)
    x[:, seed + 1 :] = 0
    x[3], x[4] = x[8], 0
    x, y, c = 10.0 ** (seed - 4) * x, one_hot(labels), 10.0 ** (4 - seed)
    weights = svm(x, labels, c).numpy()
    best = primal(x.numpy(), y, c, weights)
    generator = np.random.default_rng(seed)
    for step in (1e-1, 1e-3, 1e-5):
        for _ in range(50):
            other = weights + step * np.abs(weights).max() * generator.normal(size=weights.shape)
            assert primal(x.numpy(), y, c, other) >= best * (1 - 1e-9)


def test_embeddings_of_zeros_have_weights_of_zero() -> None:
    assert float(svm(torch.zeros(6, 4, dtype=torch.float64), torch.arange(6) % 3, 0.1).abs().max()) == 0


def test_what_is_not_finite_stays_so() -> None:
    x = torch.full((6, 4), torch.nan)
    assert not torch.isfinite(svm(x, torch.arange(6) % 3, 0.1)).any()


@pytest.mark.parametrize("ways", [2, 7])
def test_logits_are_linear_in_the_embedding_and_scaled(ways: int) -> None:
    model, task = mlp(), task_with(torch.arange(ways).repeat(2), targets=5)
    support, target = (embedded(model, x) for x in (task.support_x, task.target_x))
    weights = svm(torch.from_numpy(support), task.support_y, 0.4).numpy()
    learner = MetaOptNet(model, regularizer=0.4, scale=3.0)
    np.testing.assert_allclose(prediction(learner, task), 3 * target @ weights, rtol=1e-9)


@pytest.mark.parametrize("width", [3, 5, 40])
def test_the_ridge_is_numpys(width: int) -> None:
    model, task = mlp(width), task_with()
    x, target = (embedded(model, x) for x in (task.support_x, task.target_x))
    weights = np.linalg.solve(x.T @ x + 50 * np.eye(width), x.T @ one_hot(LABELS))
    np.testing.assert_allclose(
        prediction(MetaOptNet(model, solver="ridge", scale=1), task), 2 * target @ weights, rtol=1e-9
    )


def test_single_precision_is_solved_in_double() -> None:
    labels = torch.arange(9) % 3
    x = points(9, 4, labels).float()
    found = svm(x, labels, 0.1)
    assert found.dtype == torch.float32
    np.testing.assert_allclose(found.numpy(), svm(x.double(), labels, 0.1).numpy(), rtol=1e-5, atol=1e-7)


def test_a_missing_library_is_named_with_what_to_do(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "piqp", None)
    with pytest.raises(ArgumentError, match=r'piqp, which is not installed.*metawrap\[metaoptnet\].*solver="ridge"'):
        MetaOptNet(mlp())
    learner = MetaOptNet(mlp(), solver="ridge")
    assert learner.meta_step([task_with()]).loss > 0


def test_it_says_what_it_was_built_with() -> None:
    settings = MetaOptNet(mlp()).describe().settings
    assert (settings["solver"], settings["regularizer"]) == ("svm", 0.1)
    assert MetaOptNet(mlp(), solver="ridge").describe().settings["regularizer"] == 50
