"""A learner and labelled photos -> `Classifier`: estimate, adapt, and check that a photo's company does not matter."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metawrap.classifier.classifier import Classifier
from metawrap.classifier.estimate import Estimate, left_out
from metawrap.classifier.photos import Photos
from metawrap.data.preprocessing import Preprocessing
from metawrap.errors import MetaWrapWarning
from metawrap.surgery.inspect import batch_norms
from metawrap.tasks import device_of

# Methods on an embedding that need no training, by name; the first of equals is chosen.
EMBEDDING_METHODS = ("R2D2", "SimpleShot", "LogisticRegression", "ProtoNet")
_COMPANY = 1e-4


def fit_classifier(
    learner: Any, photos: Photos, preprocessing: Preprocessing, about: Mapping[str, Any] | None = None
) -> tuple[Classifier, Estimate | None]:
    """The classifier of the photos' classes, and how well it does on photos left out; the learner does not change.

    A learner under norm="batch" is adapted under "support": a deployed classifier sees one photo at a time.

    Args:
        learner: any method. preprocessing: how its network gets pictures. about: more for classifier.json.
    Raises:
        ArgumentError, TaskError: the photos do not fit the network: more classes than outputs, or another size.

    Warns where what a photo is taken for depends on the photos beside it.
    """
    inputs, norm = _inputs(photos, preprocessing, learner), _inductive_norm(learner)
    labels = photos.labels.to(inputs.device)
    estimate = left_out(learner, inputs, labels, photos.classes, norm)
    network = learner.adapt(inputs, labels, classes=range(len(photos.classes)), norm=norm)
    made = {
        "method": type(learner).__name__,
        "norm": norm or learner.settings.norm,
        "photos": dict(zip(photos.classes, photos.labels.bincount().tolist(), strict=True)),
        "estimate": None if estimate is None else estimate.to_dict(),
    }
    classifier = Classifier.of(network.cpu(), photos.classes, preprocessing, {**made, **(about or {})})
    _check_company(classifier, photos)
    return classifier, estimate


def choose_method(
    make: Callable[[str], Any], photos: Photos, preprocessing: Preprocessing, names: Sequence[str] = EMBEDDING_METHODS
) -> tuple[Any, dict[str, Estimate | None]]:
    """The learner that does best on photos left out, and the estimate of each method.

    Args:
        make: the learner of a method, by the name of its class.
    """
    learners = {name: make(name) for name in names}
    estimates: dict[str, Estimate | None] = {}
    for name, learner in learners.items():
        inputs = _inputs(photos, preprocessing, learner)
        estimates[name] = left_out(
            learner, inputs, photos.labels.to(inputs.device), photos.classes, _inductive_norm(learner)
        )
    best = max(names, key=lambda name: estimate.right if (estimate := estimates[name]) else 0)
    return learners[best], estimates


def _inputs(photos: Photos, preprocessing: Preprocessing, learner: Any) -> Tensor:
    pictures = torch.from_numpy(np.ascontiguousarray(photos.pictures.transpose(0, 3, 1, 2)))
    return preprocessing.normalised(pictures).to(device_of(learner))


def _inductive_norm(learner: Any) -> str | None:
    return "support" if learner.settings.norm == "batch" and batch_norms(learner.model) else None


def _check_company(classifier: Classifier, photos: Photos) -> None:
    several = photos.pictures[: min(8, len(photos.pictures))]
    together = classifier.of_pictures(several)
    alone = np.concatenate([classifier.of_pictures(one[None]) for one in several])
    if (worst := float(np.abs(together - alone).max())) > _COMPANY:
        warnings.warn(
            f"What a photo is taken for depends on the photos that are predicted with it (probabilities differ by "
            f"{worst:.2g}): the network reads its whole batch. Use a method or norm that does not, such as "
            'norm="support".',
            MetaWrapWarning,
            stacklevel=3,
        )
