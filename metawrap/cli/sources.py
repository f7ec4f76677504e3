"""The run or network that `metawrap adapt` and `metawrap serve` name -> learners, and their classifiers of photos."""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from metawrap import methods
from metawrap.classifier import Classifier, Estimate, Photos, choose_method, fit_classifier
from metawrap.classifier.fitting import EMBEDDING_METHODS
from metawrap.data.preprocessing import Preprocessing
from metawrap.errors import ArgumentError, MetaWrapWarning
from metawrap.pretrained import load_network
from metawrap.settings.keywords import nested, plain_keywords
from metawrap.training.experiment import check_options, find_device
from metawrap.training.loaded_run import load
from metawrap.training.machine import command_line
from metawrap.training.run_settings import METHODS


@dataclass(frozen=True)
class Source:
    """learners: by the name of their class, for a number of classes; more than one of them where `fit` shall choose.
    preprocessing: of their network. words: about it.
    """

    learners: Callable[[int], dict[str, Any]]
    preprocessing: Preprocessing
    words: str

    def choose(self, photos: Photos) -> tuple[Any, dict[str, Estimate | None]]:
        """The learner that does best on photos left out, and the estimate of each; a lone one has none here."""
        learners = self.learners(len(photos.classes))
        if len(learners) == 1:
            return next(iter(learners.values())), {}
        return choose_method(lambda name: learners[name], photos, self.preprocessing, tuple(learners))

    def fit(self, learner: Any, photos: Photos) -> tuple[Classifier, Estimate | None]:
        """As `fit_classifier`; classifier.json names the network and the command."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "norm=", MetaWrapWarning)  # about["norm"] says it.
            about = {"network": self.words, "command": command_line()}
            return fit_classifier(learner, photos, self.preprocessing, about)


def source_of(arguments: Namespace, method: str) -> Source:
    """The run or network that the arguments name, loaded. method: of a network, where none was given."""
    is_run = (Path(arguments.source) / "run.json").exists()
    return _run(arguments) if is_run else _network(arguments, getattr(arguments, "method", method))


def check_none_given(arguments: Namespace, names: tuple[str, ...], why: str) -> None:
    """Raises ArgumentError, which ends with `why`, if one of these flags was given."""
    if given := [name for name in names if getattr(arguments, name, None) is not None]:
        flag = "set" if given[0] == "options" else given[0].replace("_", "-")
        raise ArgumentError(f"{flag}: '{arguments.source}' is {why}. Leave --{flag} out.")


def _run(arguments: Namespace) -> Source:
    given = ("method", "weights", "image_size", "options")
    check_none_given(arguments, given, "a run, which has its method, weights and images")
    run = load(arguments.source, getattr(arguments, "checkpoint", "best"), arguments.model, arguments.device)
    words = f"run '{arguments.source}' (trained on {run.settings.data}, epoch {run.epoch})"
    return Source(lambda ways: {type(run.learner).__name__: run.learner}, run.preprocessing, words)


def _network(arguments: Namespace, name: str) -> Source:
    source, device = arguments.source, find_device(arguments.device)
    if Path(source).is_dir() and ":" not in source:
        raise ArgumentError(
            f"'{source}' is a folder without run.json: no run. Name a run, or a network as module:name."
        )
    weights = getattr(arguments, "weights", None)
    network = load_network(source, weights)
    preprocessing = network.preprocessing
    if (size := getattr(arguments, "image_size", None)) is not None:
        preprocessing = (
            Preprocessing(size=(size, size)) if preprocessing is None else replace(preprocessing, size=(size, size))
        )
    if preprocessing is None:
        raise ArgumentError(
            f"image_size: nothing says which images '{source}' takes. Pass --image-size N, or set its attribute "
            "'preprocessing'."
        )
    options = nested(dict(getattr(arguments, "options", [])))
    classes = EMBEDDING_METHODS if name == "auto" else (METHODS[name],)
    for each in classes:
        check_options(method := getattr(methods, each), options, plain_keywords(method))
    # A method on an embedding keeps the statistics of the pretrained norms; another learns a new head.
    if set(classes) <= set(EMBEDDING_METHODS):
        keywords = {"norm": "running", **options}
        made = {each: getattr(methods, each)(network.model, **keywords).to(device).eval() for each in classes}
        return Source(lambda ways: made, preprocessing, network.words)

    @cache
    def learners(ways: int) -> dict[str, Any]:
        model = load_network(source, weights, ways=ways).model
        return {each: getattr(methods, each)(model, **options).to(device).eval() for each in classes}

    return Source(learners, preprocessing, network.words)
