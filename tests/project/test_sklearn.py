"""FewShotClassifier predicts what `learner.adapt` does, and is what scikit-learn's tools take for a classifier."""

from __future__ import annotations

import importlib
import pickle
import sys
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from face import build, fingerprint
from keywords import grouped
from models import Conv4, NormedMlp, class_tasks, seeded
from sklearn.base import clone
from sklearn.metrics import accuracy_score
from sklearn.model_selection import GridSearchCV, cross_val_score
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from sklearn.utils.estimator_checks import parametrize_with_checks
from torch import Tensor, nn

from metawrap import ANIL, MAML, FineTune, MAMLPlusPlus, MetaWrapError, ProtoNet
from metawrap.errors import ArgumentError, TaskError, UnsupportedModuleError
from metawrap.sklearn import FewShotClassifier

NAMES = np.array(["cat", "ant", "bee"])
IN_ORDER = ["ant", "bee", "cat"]


def rows(seed: int = 0) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Support and target rows of four numbers, 5 and 7 of each of three classes, with names for labels."""
    parts = [part[0].numpy() for part in class_tasks((4,), tasks=1, shots=5, targets=7, seed=seed)]
    return parts[0], NAMES[parts[1]], parts[2], NAMES[parts[3]]


def learner_for(norm: str = "support", method: Any = MAMLPlusPlus, **options: Any) -> Any:
    if method in (MAML, MAMLPlusPlus):
        return build(seeded(NormedMlp), method=method, norm=norm, **options)
    return method(seeded(NormedMlp), norm=norm, **grouped(**options))


@pytest.mark.parametrize("norm", ["batch", "running", "support"])
@pytest.mark.parametrize("method", [MAMLPlusPlus, ANIL, ProtoNet, FineTune])
def test_predictions_are_those_of_the_adapted_module_under_the_users_labels(method, norm):
    learner = learner_for(norm, method)
    support, y, target, _ = rows()
    model = FewShotClassifier(learner).fit(support, y)
    numbers = torch.tensor([IN_ORDER.index(name) for name in y])
    logits = learner.adapt(torch.tensor(support), numbers)(torch.tensor(target)).detach().numpy()
    shares = np.exp(logits - logits.max(1, keepdims=True))
    shares /= shares.sum(1, keepdims=True)
    assert model.classes_.tolist() == IN_ORDER
    np.testing.assert_allclose(model.predict_proba(target), shares, rtol=1e-9)
    assert model.predict(target).tolist() == [IN_ORDER[index] for index in logits.argmax(1)]
    assert type(model.module_) is NormedMlp


def test_score_is_the_fraction_of_right_rows_and_steps_reach_the_learner():
    support, y, target, target_y = rows()
    learner = learner_for()
    for steps in (0, 1, 4):
        model = FewShotClassifier(learner, steps=steps).fit(support, y)
        assert model.score(target, target_y) == accuracy_score(target_y, model.predict(target))
        numbers = torch.tensor([IN_ORDER.index(name) for name in y])
        expected = learner.adapt(torch.tensor(support), numbers, steps)(torch.tensor(target)).softmax(1)
        np.testing.assert_allclose(model.predict_proba(target), expected.detach().numpy(), rtol=1e-9)


def test_fitting_and_predicting_leave_the_learner_as_it_was():
    learner = learner_for()
    before = fingerprint(learner)
    support, y, target, _ = rows()
    FewShotClassifier(learner).fit(support, y).predict(target)
    assert fingerprint(learner) == before


def test_a_clone_has_a_copy_of_the_learner_and_fits_alike():
    support, y, target, _ = rows()
    model = FewShotClassifier(learner_for(), steps=3).fit(support, y)
    copied = clone(model)
    assert copied.learner is not model.learner
    assert copied.get_params()["steps"] == 3
    assert not hasattr(copied, "classes_")
    np.testing.assert_array_equal(copied.fit(support, y).predict_proba(target), model.predict_proba(target))
    copied.set_params(steps=0)
    assert not np.array_equal(copied.fit(support, y).predict_proba(target), model.predict_proba(target))


def test_a_fitted_classifier_is_pickled_with_its_module():
    support, y, target, _ = rows()
    model = FewShotClassifier(learner_for()).fit(support, y)
    again = pickle.loads(pickle.dumps(model))
    np.testing.assert_array_equal(again.predict_proba(target), model.predict_proba(target))


@pytest.mark.parametrize("norm", ["batch", "running", "support"])
def test_a_row_is_predicted_alike_in_any_company_except_under_batch_statistics(norm):
    support, y, target, _ = rows()
    model = FewShotClassifier(learner_for(norm)).fit(support, y)
    together, apart = model.predict_proba(target)[:6], model.predict_proba(target[:6])
    assert np.allclose(together, apart, rtol=1e-9) == (norm != "batch")
    if norm != "batch":
        cut = FewShotClassifier(learner_for(norm), batch_size=4).fit(support, y)
        np.testing.assert_allclose(cut.predict_proba(target)[:6], together, rtol=1e-9)


def test_batch_size_is_refused_where_it_would_change_predictions_only():
    support, y, target, _ = rows()
    with pytest.raises(ArgumentError, match=r'batch_size: under norm="batch".*norm="support"'):
        FewShotClassifier(learner_for("batch"), batch_size=4).fit(support, y)
    plain = MAMLPlusPlus(seeded(lambda: nn.Sequential(nn.Linear(4, 3))), norm="batch")
    assert FewShotClassifier(plain, batch_size=4).fit(support, y).predict(target).shape == (21,)


def test_flattened_images_reach_the_network_in_the_shape_that_is_named():
    parts = [part[0] for part in class_tasks((1, 8, 8), tasks=1, shots=2)]
    learner = build(seeded(lambda: Conv4(blocks=2, size=8)), norm="support")
    support, target = (part.flatten(1).numpy() for part in (parts[0], parts[2]))
    model = FewShotClassifier(learner, input_shape=(1, 8, 8)).fit(support, parts[1].numpy())
    expected = learner.adapt(parts[0], parts[1])(parts[2]).softmax(1).detach().numpy()
    np.testing.assert_allclose(model.predict_proba(target), expected, rtol=1e-9)
    whole = FewShotClassifier(learner).fit(parts[0].numpy(), parts[1].numpy())
    np.testing.assert_allclose(whole.predict_proba(parts[2].numpy()), expected, rtol=1e-9)
    with pytest.raises(ArgumentError, match=r"X: expected rows of shape \(1, 8, 8\), as in fit, but got \(1, 4, 16\)"):
        whole.predict(parts[2].reshape(-1, 1, 4, 16).numpy())
    with pytest.raises(ArgumentError, match=r"input_shape: expected 64 numbers.*\(1, 8, 9\) has 72"):
        FewShotClassifier(learner, input_shape=(1, 8, 9)).fit(support, parts[1].numpy())


@pytest.mark.parametrize("smoothing", [0.0, 0.1])  # A smoothed loss asks for outputs that a mask would take away.
def test_fewer_classes_than_outputs_are_fitted_with_the_other_outputs_masked_if_the_loss_allows(smoothing):
    support, y, target, _ = rows()
    two = y != "cat"
    learner = learner_for()
    learner.loss_fn = nn.CrossEntropyLoss(label_smoothing=smoothing)
    model = FewShotClassifier(learner).fit(support[two], y[two])
    numbers = torch.tensor([IN_ORDER.index(name) for name in y[two]])
    adapted = learner.adapt(torch.tensor(support[two]), numbers, mask_unused_outputs=not smoothing)
    expected = adapted(torch.tensor(target))[:, :2].softmax(1).detach().numpy()
    np.testing.assert_allclose(model.predict_proba(target), expected, rtol=1e-9)
    assert set(model.predict(target)) <= {"ant", "bee"}
    learner.loss_fn = nn.NLLLoss()
    with pytest.raises(TaskError, match="needs log-probabilities"):
        FewShotClassifier(learner).fit(support[two], y[two])


@pytest.mark.parametrize("method", [MAMLPlusPlus, ANIL, FineTune])
def test_more_classes_than_outputs_are_refused_and_the_last_fit_stays(method):
    support, y, target, _ = rows()
    model = FewShotClassifier(learner_for("support", method)).fit(support, y)
    before = model.predict_proba(target)
    with pytest.raises(ArgumentError, match=r"y: 5 classes.*has 3 outputs. Fit at most 3 classes"):
        model.fit(support, np.arange(15) % 5)
    np.testing.assert_array_equal(model.predict_proba(target), before)


def test_a_method_with_a_fitted_head_takes_any_number_of_classes():
    support, _, target, _ = rows()
    model = FewShotClassifier(learner_for("support", ProtoNet)).fit(support, np.arange(15) % 5)
    assert model.predict_proba(target).shape == (21, 5)


def test_what_is_no_learner_or_no_logits_is_refused_by_name():
    support, y, _, _ = rows()
    with pytest.raises(ArgumentError, match="learner: expected a method of metawrap"):
        FewShotClassifier(NormedMlp()).fit(support, y)
    with pytest.raises(ArgumentError, match="batch_size: expected whole numbers of at least 1, or None, but got 0"):
        FewShotClassifier(learner_for(), batch_size=0).fit(support, y)

    class Pair(NormedMlp):
        def forward(self, x: Tensor) -> Any:
            return super().forward(x), x

    learner = MAMLPlusPlus(Pair().double(), loss_fn=lambda out, y: nn.functional.cross_entropy(out[0], y))
    with pytest.raises(UnsupportedModuleError, match=r"prediction is a tuple with output.*needs a tensor of logits"):
        FewShotClassifier(learner).fit(support, y)


class Words(nn.Module):
    """Token ids (rows, words) to a dict of logits; the ids must be whole numbers."""

    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(20, 4), nn.Linear(4, 3)

    def forward(self, ids: Tensor) -> Any:
        return {"logits": self.head(torch.tanh(self.table(ids).mean(1)))}


class Bits(Words):
    """Looks up the bits of a number: takes truth values too."""

    def forward(self, ids: Tensor) -> Any:
        return super().forward(ids.long() % 20)


@pytest.mark.parametrize("dtype", [np.int64, np.int32, np.uint8])
@pytest.mark.parametrize("method", [MAML, ANIL, ProtoNet])
def test_token_ids_stay_whole_numbers(method, dtype):
    learner, ids, y = method(seeded(Words)), np.arange(54).reshape(9, 6) % 20, NAMES[np.arange(9) % 3]
    model = FewShotClassifier(learner, batch_size=4).fit(ids.astype(dtype), y)
    numbers = torch.tensor([IN_ORDER.index(name) for name in y])
    expected = learner.adapt(torch.tensor(ids), numbers)(torch.tensor(ids))["logits"].softmax(1)
    np.testing.assert_allclose(model.predict_proba(ids), expected.detach().numpy(), rtol=1e-9)
    with pytest.raises(ArgumentError, match=r"X: expected whole numbers, as in fit, but got float64"):
        model.predict(ids + 0.5)


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda ids: ids.astype(float), r"as torch\.float64, .*indices.*X\.astype\(int\)"),
        (lambda ids: ids + 20, r"as torch\.int64, index out of range.*as torch\.float64"),
    ],
)
def test_rows_that_the_network_cannot_take_are_refused_as_x(change, words):
    ids, y = np.arange(54).reshape(9, 6) % 20, NAMES[np.arange(9) % 3]
    with pytest.raises(ArgumentError, match=r"^X: Words cannot take rows of shape \(6,\): " + words):
        FewShotClassifier(MAML(seeded(Words))).fit(change(ids), y)
    with pytest.raises(ArgumentError, match=r"^X: NormedMlp cannot take .*\(6,\): as torch.float64, mat1"):
        FewShotClassifier(learner_for()).fit(ids * 0.5, y)


def test_whole_numbers_are_kept_or_become_floats_only_where_that_is_exact():
    learner = FewShotClassifier(ProtoNet(nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 2))))
    X, y = np.array([[0, 1], [255, 7]]), [0, 1]  # noqa: N806
    np.testing.assert_array_equal(learner.fit(X, y).predict_proba(X), learner.fit(X * 1.0, y).predict_proba(X * 1.0))
    with pytest.raises(ArgumentError, match=r"X: whole numbers up to 16777217 are not exact in torch\.float32"):
        learner.fit(X + 2**24 - 254, y)
    learner.fit((X + 2**24 - 254).astype(float), y)
    big = np.array([[2**53 + 1], [2**53 + 2]])
    taken = FewShotClassifier(ProtoNet(seeded(Bits))).fit(big, y)
    assert taken.predict(big).tolist() == y


def test_pipeline_cross_validation_and_grid_search_run_it():
    support, y, target, target_y = rows()
    model = make_pipeline(StandardScaler(), FewShotClassifier(learner_for()))
    scaled = (support - support.mean(0)) / support.std(0)
    alone = FewShotClassifier(learner_for()).fit(scaled, y)
    np.testing.assert_allclose(
        model.fit(support, y).predict_proba(target),
        alone.predict_proba((target - support.mean(0)) / support.std(0)),
        rtol=1e-9,
    )
    folds = cross_val_score(model, target, target_y, cv=3)
    assert folds.shape == (3,)
    assert np.all((folds >= 0) & (folds <= 1))
    search = GridSearchCV(model, {"fewshotclassifier__steps": [0, 2]}, cv=3).fit(target, target_y)
    assert search.best_params_["fewshotclassifier__steps"] in (0, 2)


def test_without_scikit_learn_the_error_names_the_extra(monkeypatch):
    for name in ("sklearn", "sklearn.base"):
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.delitem(sys.modules, "metawrap.sklearn")
    with pytest.raises(MetaWrapError, match=r'needs scikit-learn 1\.6.*pip install "metawrap\[sklearn\]"'):
        importlib.import_module("metawrap.sklearn")


class OfAnyWidth(nn.Module):
    """Takes rows of any length, as the checks bring 1 to 20 numbers; ten outputs, more than they have classes."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(8, 16), nn.Tanh())
        self.head = nn.Linear(16, 10)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.body(nn.functional.adaptive_avg_pool1d(x.unsqueeze(1), 8).squeeze(1)))


def estimators() -> list[FewShotClassifier]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return [
            FewShotClassifier(MAML(OfAnyWidth(), inner_steps=20, inner_lr=0.5)),
            FewShotClassifier(ProtoNet(OfAnyWidth())),
        ]


def not_for_modules(_: Any) -> dict[str, str]:
    return {
        "check_estimators_overwrite_params": "compares joblib's hashes, which differ between equal torch tensors; "
        "test_fitting_and_predicting_leave_the_learner_as_it_was compares the values"
    }


@pytest.mark.sampled(21)
@parametrize_with_checks(estimators(), expected_failed_checks=not_for_modules, xfail_strict=True)
def test_scikit_learns_own_checks_pass(estimator, check):
    check(estimator)


def test_classifiers_of_one_learner_fit_in_joblibs_threads() -> None:
    learner = learner_for()
    support, y, target, _ = rows()
    alone = FewShotClassifier(learner).fit(support, y).predict_proba(target)
    fit = joblib.delayed(lambda: FewShotClassifier(learner).fit(support, y).predict_proba(target))
    for found in joblib.Parallel(4, backend="threading")(fit() for _ in range(12)):
        np.testing.assert_allclose(found, alone, rtol=1e-6, atol=1e-6)
