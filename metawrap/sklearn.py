"""A learner as a scikit-learn classifier: fit -> `learner.adapt` on the rows -> a plain module -> predict.

The learner is meta-trained with torch. The classifier then takes numpy arrays and labels of any type, and works in
`Pipeline`, `cross_val_score` and `GridSearchCV`.
"""

from __future__ import annotations

import inspect
import math
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from metawrap.errors import ArgumentError, MetaWrapError, TaskError, UnsupportedModuleError, shown
from metawrap.inner_loop.masking import MaskRefusedError
from metawrap.learner.learner import Learner
from metawrap.outputs import in_words, prediction_in
from metawrap.surgery.inspect import batch_norms
from metawrap.tasks import describe_value, device_of

try:
    from sklearn.base import BaseEstimator, ClassifierMixin
    from sklearn.utils.multiclass import check_classification_targets
    from sklearn.utils.validation import check_is_fitted, validate_data
except ImportError as error:
    raise MetaWrapError('metawrap.sklearn needs scikit-learn 1.6 or newer: pip install "metawrap[sklearn]".') from error


class FewShotClassifier(ClassifierMixin, BaseEstimator):  # type: ignore[misc]
    """A meta-trained learner that fits a few labelled rows, as scikit-learn's classifiers do.

    `fit` adapts to the rows as to one support set and leaves the learner unchanged. Under norm="batch" a prediction
    depends on the other rows of the same call; norm="support" and norm="running" predict each row alike in any company.

    >>> import numpy as np
    >>> from torch import nn
    >>> from metawrap import ProtoNet
    >>> X = np.array([[0.0, 0.1], [0.1, 0.0], [5.0, 5.1], [5.1, 5.0]])
    >>> learner = ProtoNet(nn.Linear(2, 8), embedding="output")
    >>> model = FewShotClassifier(learner).fit(X, ["near", "near", "far", "far"])
    >>> model.predict(X).tolist()
    ['near', 'near', 'far', 'far']

    Args:
        learner: a meta-trained method, such as `MAMLPlusPlus`. Only scikit-learn's `clone` copies it.
        steps: inner steps of `learner.adapt`; None means as in training.
        input_shape: the shape of one example for the network, such as (1, 28, 28) for flat rows of 784 numbers; None
            means the shape of the rows.
        batch_size: rows that are predicted together; None means all. Refused with batch norms under norm="batch".

    Attributes after `fit`:
        classes_: (classes,), the labels in order. module_: the adapted module. n_features_in_: the size of the second
        axis of X. example_shape_: the shape of one row of X.

    Raises:
        ArgumentError: an argument or the rows do not fit the learner, or y has more classes than the network outputs.
        UnsupportedModuleError: the network's prediction is no tensor of logits.
        ValueError: scikit-learn's own checks of X and y: rows without a label, missing values, other feature counts.
    """

    def __init__(
        self,
        learner: Learner,
        *,
        steps: int | None = None,
        input_shape: tuple[int, ...] | None = None,
        batch_size: int | None = None,
    ) -> None:
        self.learner = learner
        self.steps = steps
        self.input_shape = input_shape
        self.batch_size = batch_size

    def fit(self, X: Any, y: Any) -> FewShotClassifier:  # noqa: N803
        """Adapts to X, (rows, ...) numbers, with the labels y, (rows,) of any type.

        For fewer classes than outputs, the inner loop masks the other outputs if the method can
        (`mask_unused_outputs`), and the loss too. Predictions are always classes of y.
        """
        self._check_arguments()
        X, y = validate_data(self, X, y, allow_nd=True)  # noqa: N806
        check_classification_targets(y)
        classes, numbers = np.unique(y, return_inverse=True)
        # The attributes change last, so that a failed fit keeps the previous one.
        rows, outputs = self._tried(X)
        module = self._adapted(rows, torch.as_tensor(numbers, device=rows.device), len(classes), outputs)
        self.classes_, self.example_shape_, self.module_ = classes, X.shape[1:], module
        self._dtype = rows.dtype
        return self

    def predict(self, X: Any) -> np.ndarray[Any, Any]:  # noqa: N803
        """The label of each row, (rows,)."""
        best = self.predict_proba(X).argmax(1)
        labels: np.ndarray[Any, Any] = self.classes_[best]
        return labels

    def predict_proba(self, X: Any) -> np.ndarray[Any, Any]:  # noqa: N803
        """The softmax over the scores of the classes, (rows, classes) in the order of `classes_`.

        The values rank classes and are no calibrated probabilities, also for the pair scores of `RelationNet` and
        `SiameseNet`.
        """
        check_is_fitted(self, "module_")
        X = validate_data(self, X, allow_nd=True, reset=False)  # noqa: N806
        if X.shape[1:] != self.example_shape_:
            raise ArgumentError(f"X: expected rows of shape {self.example_shape_}, as in fit, but got {X.shape[1:]}.")
        with torch.no_grad():
            parts = torch.split(self._as_inputs(X, self._dtype), self.batch_size or len(X))
            scores = torch.cat([prediction_in(self.module_(part)) for part in parts])  # type: ignore[misc]
            shares = scores[:, : len(self.classes_)].double().softmax(1)
        numbers: np.ndarray[Any, Any] = shares.cpu().numpy()
        return numbers

    def _check_arguments(self) -> None:
        if not isinstance(self.learner, Learner):
            raise ArgumentError(
                f"learner: expected a method of metawrap, such as MAMLPlusPlus(model), but got "
                f"{describe_value(self.learner)}."
            )
        if self.batch_size is not None:
            _check_sizes("batch_size", (self.batch_size,), self.batch_size)
        if self.input_shape is not None:
            _check_sizes("input_shape", self.input_shape, self.input_shape)
        if self.batch_size is not None and self.learner.settings.norm == "batch" and batch_norms(self.learner.model):
            raise ArgumentError(
                'batch_size: under norm="batch" a prediction depends on the rows that it is made with, so batches '
                'would change it. Leave batch_size out, or build the learner with norm="support" or "running".'
            )

    def _as_inputs(self, X: np.ndarray[Any, Any], dtype: torch.dtype) -> Tensor:  # noqa: N803
        """The rows as the network takes them; raises ArgumentError where numbers would change."""
        if self.input_shape is not None:
            if math.prod(X.shape[1:]) != math.prod(self.input_shape):
                raise ArgumentError(
                    f"input_shape: expected {math.prod(X.shape[1:])} numbers, as many as a row of X has, but "
                    f"{self.input_shape} has {math.prod(self.input_shape)}."
                )
            X = X.reshape(len(X), *self.input_shape)  # noqa: N806
        rows = torch.tensor(X, dtype=dtype, device=device_of(self.learner))
        whole = X.dtype.kind in _WHOLE
        if whole and not np.array_equal(rows.cpu().to(torch.int64).numpy(), X):
            raise ArgumentError(
                f"X: whole numbers up to {X.max()} are not exact in {dtype}, in which the network runs. Pass "
                "X.astype(float) if rounding does no harm."
            )
        if not whole and dtype == torch.int64:
            raise ArgumentError(f"X: expected whole numbers, as in fit, but got {X.dtype}. Pass X.astype(int).")
        return rows

    def _tried(self, X: np.ndarray[Any, Any]) -> tuple[Tensor, Any]:  # noqa: N803
        """The rows in the dtype that the network takes, and what it returns for them.

        Whole numbers stay what they are where the network takes them, as one of token ids does. All else becomes
        floating-point numbers of the network's own precision.
        """
        network = self.learner.unwrap().eval()
        like = next(parameter for parameter in self.learner.parameters() if parameter.is_floating_point())
        failed: dict[torch.dtype, Exception] = {}
        for dtype in [*([torch.int64] if X.dtype.kind in _WHOLE else []), like.dtype]:
            rows = self._as_inputs(X, dtype)
            try:
                with torch.no_grad():
                    return rows, network(rows)
            except (RuntimeError, TypeError, ValueError, IndexError) as error:
                failed[dtype] = error
        told = "; ".join(f"as {dtype}, {' '.join(str(error).split())[:200]}" for dtype, error in failed.items())
        fix = "" if X.dtype.kind in _WHOLE else ", and X.astype(int) token ids their dtype"
        raise ArgumentError(
            f"X: {type(network).__name__} cannot take rows of shape {tuple(rows.shape[1:])}: {told}. Pass rows as it "
            f"takes them; input_shape= gives flat rows their shape{fix}."
        ) from failed[like.dtype]

    def _adapted(self, rows: Tensor, labels: Tensor, classes: int, output: Any) -> nn.Module:
        extra: dict[str, Any] = {}
        if "mask_unused_outputs" in inspect.signature(self.learner.adapt).parameters:
            fewer = classes < self._check_outputs(output, rows, classes)
            extra = {"mask_unused_outputs": True} if fewer else {}
        try:
            module = self.learner.adapt(rows, labels, self.steps, **extra)
        except TaskError as error:
            self._check_outputs(output, rows, classes)
            if not isinstance(error, MaskRefusedError):
                raise
            module = self.learner.adapt(rows, labels, self.steps)  # The loss counts them, as it did in training.
        with torch.no_grad():
            self._check_outputs(module(rows), rows, classes)
        return module

    def _check_outputs(self, output: Any, rows: Tensor, classes: int) -> int:
        """The number of outputs. Raises ArgumentError if `classes` is larger."""
        scores = prediction_in(output)
        if scores is None or scores.ndim != 2 or len(scores) != len(rows):
            found = in_words(output) if scores is None else describe_value(scores)
            raise UnsupportedModuleError(
                f"The network's prediction is {found} for {len(rows)} rows, but FewShotClassifier "
                "needs a tensor of logits, (rows, classes). Wrap a network that returns these."
            )
        if classes > (outputs := int(scores.shape[1])):
            raise ArgumentError(
                f"y: {classes} classes, but the network that {type(self.learner).__name__} was meta-trained with has "
                f"{outputs} outputs. Fit at most {outputs} classes, or meta-train a network with more outputs."
            )
        return outputs


# The kinds of numpy's whole numbers, truth values among them.
_WHOLE = "iub"


def _check_sizes(name: str, sizes: Any, given: Any) -> None:
    whole = isinstance(sizes, tuple | list) and all(isinstance(n, int) and not isinstance(n, bool) for n in sizes)
    if not whole or min(sizes, default=1) < 1:
        raise ArgumentError(f"{name}: expected whole numbers of at least 1, or None, but got {shown(given)}.")
