"""A learner and labelled photos or texts -> `Classifier`: estimate, adapt, and check that no example sees another."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from metawrap.classifier.classifier import Classifier
from metawrap.classifier.estimate import Estimate, embedded, left_out
from metawrap.classifier.photos import Photos
from metawrap.classifier.program import Way
from metawrap.classifier.texts import Texts
from metawrap.errors import MetaWrapWarning
from metawrap.learner.embedding_learner import EmbeddingLearner
from metawrap.surgery.inspect import batch_norms
from metawrap.tasks import device_of

# Methods on an embedding that need no training, by name; the first of equals is chosen.
EMBEDDING_METHODS = ("R2D2", "SimpleShot", "LogisticRegression", "ProtoNet")
_COMPANY = 1e-4
Examples = Photos | Texts


def fit_classifier(
    learner: Any, examples: Examples, preprocessing: Way, about: Mapping[str, Any] | None = None
) -> tuple[Classifier, Estimate | None]:
    """The classifier of the examples' classes, and how well it does on some left out; the learner does not change.

    A learner under norm="batch" is adapted under "support": a deployed classifier sees one photo at a time.

    Args:
        learner: any method. preprocessing: how its network gets them. about: more for classifier.json.
    Raises:
        ArgumentError, TaskError: the examples do not fit the network: more classes than outputs, or another size.

    Warns where what an example is taken for depends on the examples beside it.
    """
    inputs, norm = preprocessing.inputs(examples.prepared).to(device_of(learner)), _inductive_norm(learner)
    labels = examples.labels.to(inputs.device)
    estimate = left_out(learner, inputs, labels, examples.classes, norm, embedded(learner, inputs, labels, norm))
    network = learner.adapt(inputs, labels, classes=range(len(examples.classes)), norm=norm)
    made = {
        "method": type(learner).__name__,
        "norm": norm or learner.settings.norm,
        preprocessing.kind: dict(zip(examples.classes, examples.labels.bincount().tolist(), strict=True)),
        "estimate": None if estimate is None else estimate.to_dict(),
    }
    temperature = 1.0 if estimate is None else estimate.temperature
    classifier = Classifier.of(network.cpu(), examples.classes, preprocessing, {**made, **(about or {})}, temperature)
    _check_company(classifier, examples)
    return classifier, estimate


def choose_method(
    make: Callable[[str], Any], examples: Examples, preprocessing: Way, names: Sequence[str] = EMBEDDING_METHODS
) -> tuple[Any, dict[str, Estimate | None]]:
    """The learner that does best on examples left out, and the estimate of each method.

    Args:
        make: the learner of a method, by the name of its class.
    """
    learners = {name: make(name) for name in names}
    estimates: dict[str, Estimate | None] = {}
    shown: tuple[Any, Tensor | None] | None = None  # A learner, and what its network makes of the examples.
    for name, learner in learners.items():
        inputs, norm = preprocessing.inputs(examples.prepared).to(device_of(learner)), _inductive_norm(learner)
        labels = examples.labels.to(inputs.device)
        if shown is None or not _embed_alike(shown[0], learner):
            shown = learner, embedded(learner, inputs, labels, norm)
        estimates[name] = left_out(learner, inputs, labels, examples.classes, norm, shown[1])
    best = max(names, key=lambda name: estimate.right if (estimate := estimates[name]) else 0)
    return learners[best], estimates


def _embed_alike(one: Any, other: Any) -> bool:
    """Whether two learners are methods on an embedding, of equal networks, under one norm policy."""
    if not isinstance(one, EmbeddingLearner) or not isinstance(other, EmbeddingLearner) or one.flat != other.flat:
        return False
    settings = [
        (type(each.model), each.settings.norm, each.options["head"], each.embedding.source) for each in (one, other)
    ]
    states = [each.model.state_dict() for each in (one, other)]
    return (
        settings[0] == settings[1]
        and states[0].keys() == states[1].keys()
        and all(torch.equal(tensor, states[1][key]) for key, tensor in states[0].items())
    )


def _inductive_norm(learner: Any) -> str | None:
    return "support" if learner.settings.norm == "batch" and batch_norms(learner.model) else None


def _check_company(classifier: Classifier, examples: Examples) -> None:
    several = examples.prepared[: min(8, len(examples.prepared))]
    together = classifier.of_prepared(several)
    alone = np.concatenate([classifier.of_prepared([one]) for one in several])
    if (worst := float(np.abs(together - alone).max())) > _COMPANY:
        kind = classifier.preprocessing.kind
        warnings.warn(
            f"What a {kind[:-1]} is taken for depends on the {kind} that are predicted with it (probabilities differ "
            f"by {worst:.2g}): the network reads its whole batch. Use a method or norm that does not, such as "
            'norm="support".',
            MetaWrapWarning,
            stacklevel=3,
        )
