"""LogisticRegression against scikit-learn's, and its derivative against differences."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from by_hand import LABELS, embedded, mlp, prediction, task_with
from sklearn.linear_model import LogisticRegression as Reference
from torch import nn

from metawrap import LogisticRegression, MetaWrapError
from metawrap.heads.fitted import one_hot
from metawrap.heads.softmax_regression import softmax_regression


def reference(x: np.ndarray, y: np.ndarray, regularizer: float) -> tuple[np.ndarray, np.ndarray]:
    """Weights (ways, numbers) and biases (ways,) of scikit-learn; for two classes those of its one row."""
    ways = int(y.max()) + 1
    c = (2 if ways == 2 else 1) / regularizer
    fitted = Reference(C=c, tol=1e-10, max_iter=10_000).fit(x, y)
    if ways > 2:
        return fitted.coef_, fitted.intercept_
    return np.vstack([-fitted.coef_, fitted.coef_]) / 2, np.array([-1, 1]) * fitted.intercept_ / 2


@pytest.mark.parametrize("regularizer", [0.01, 1.0, 30.0])
@pytest.mark.parametrize(("examples", "numbers", "ways"), [(6, 5, 2), (25, 100, 5), (60, 4, 3), (40, 30, 20)])
def test_the_coefficients_are_those_of_scikit_learn(examples: int, numbers: int, ways: int, regularizer: float) -> None:
    x = torch.randn(examples, numbers, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    x = nn.functional.normalize(x, dim=1)
    # Unlike numbers of examples.
    y = torch.cat([torch.arange(ways), torch.arange(examples - ways).sqrt().long() % ways])
    found = softmax_regression(x, one_hot(y, ways, x), regularizer).numpy()
    weights, biases = reference(x.numpy(), y.numpy(), regularizer)
    np.testing.assert_allclose(found[:, :-1], weights, atol=1e-5)
    np.testing.assert_allclose(found[:, -1], biases, atol=1e-5)


@pytest.mark.parametrize("labels", [LABELS, torch.tensor([1, 0, 1, 1])])
def test_logits_and_the_adapted_module_are_those_of_scikit_learn_on_lengths_of_one(labels: torch.Tensor) -> None:
    model, task = mlp(), task_with(labels)
    support, target = (
        e / np.linalg.norm(e, axis=1)[:, None] for e in (embedded(model, x) for x in (task.support_x, task.target_x))
    )
    weights, biases = reference(support, labels.numpy(), 0.5)
    learner = LogisticRegression(model, regularizer=0.5)
    np.testing.assert_allclose(prediction(learner, task), target @ weights.T + biases, atol=1e-5)
    adapted = learner.adapt(task.support_x, task.support_y)(task.target_x).detach().numpy()
    np.testing.assert_allclose(adapted, target @ weights.T + biases, atol=1e-5)


def test_its_derivative_is_that_of_differences() -> None:
    torch.manual_seed(0)
    x, y = torch.randn(4, 2, dtype=torch.float64), torch.tensor([0, 0, 1, 2])
    weighted = torch.randn(3, 3, dtype=torch.float64)  # Also asks for what all rows share, which is always 0.
    function = lambda inputs: (softmax_regression(inputs, one_hot(y, 3, x), 0.3) * weighted).sum()
    assert torch.autograd.gradcheck(function, x.requires_grad_(), eps=1e-5, atol=1e-7)


def test_it_learns_through_the_solution() -> None:
    learner, task = LogisticRegression(mlp(), meta_lr=0.05), task_with()
    losses = [learner.meta_step([task]).loss for _ in range(10)]
    assert losses[-1] < 0.9 * losses[0]


def test_repeated_separable_and_half_precision_examples_are_solved() -> None:
    x, y = torch.eye(4).bfloat16().repeat(3, 1), torch.arange(4).repeat(3)
    found = softmax_regression(x, one_hot(y, 4, x), 1e-3)
    assert found.dtype == torch.bfloat16
    assert torch.equal((x @ found[:, :-1].T + found[:, -1]).argmax(1), y)


def test_what_is_not_finite_stays_so_and_one_class_has_no_weights() -> None:
    x = torch.ones(3, 2)
    assert softmax_regression(x * torch.nan, one_hot(torch.arange(3), 3, x), 1.0).isnan().all()
    assert torch.equal(softmax_regression(x, one_hot(torch.zeros(3), 1, x), 1.0), torch.zeros(1, 3))


def test_a_problem_that_is_too_hard_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("metawrap.heads.softmax_regression._STEPS", 2)
    x = torch.randn(9, 2, generator=torch.Generator().manual_seed(0))
    with pytest.raises(MetaWrapError, match=r"support set of 9 examples .* regularizer=1e-06\. Raise it"):
        softmax_regression(x, one_hot(torch.arange(9) % 3, 3, x), 1e-6)
