"""The run or network that `metawrap adapt` and `metawrap serve` name -> learners, and their classifiers."""

from __future__ import annotations

import warnings
from argparse import Namespace
from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

from torch import nn

from metawrap import methods
from metawrap.classifier import Classifier, Estimate, choose_method, fit_classifier
from metawrap.classifier.fitting import EMBEDDING_METHODS, Examples
from metawrap.classifier.program import Way
from metawrap.data.preprocessing import Preprocessing
from metawrap.errors import ArgumentError, MetaWrapWarning
from metawrap.pretrained import DEFAULT, load_network
from metawrap.sentence_encoder import load_encoder
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
    preprocessing: Way
    words: str

    def choose(self, examples: Examples) -> tuple[Any, dict[str, Estimate | None]]:
        """The learner that does best on examples left out, and the estimate of each; a lone one has none here."""
        learners = self.learners(len(examples.classes))
        if len(learners) == 1:
            return next(iter(learners.values())), {}
        return choose_method(lambda name: learners[name], examples, self.preprocessing, tuple(learners))

    def fit(self, learner: Any, examples: Examples) -> tuple[Classifier, Estimate | None]:
        """As `fit_classifier`; classifier.json names the network and the command."""
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "norm=", MetaWrapWarning)  # about["norm"] says it.
            about = {"network": self.words, "command": command_line()}
            return fit_classifier(learner, examples, self.preprocessing, about)


def source_of(arguments: Namespace, texts: bool = False) -> Source:
    """The run or network that the arguments name, loaded. texts: whether its classifier shall be one of texts."""
    if texts:
        return _encoder(arguments)
    return _run(arguments) if (Path(arguments.source) / "run.json").exists() else _network(arguments)


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


def _encoder(arguments: Namespace) -> Source:
    check_none_given(arguments, ("image_size",), "a network of texts")
    encoder, way, words = load_encoder(arguments.source, getattr(arguments, "weights", DEFAULT))
    _, make = _methods(arguments)
    return Source(lambda ways: make(nn.Sequential(encoder, nn.Linear(encoder.width, ways))), way, words)


def _methods(arguments: Namespace) -> tuple[bool, Callable[[nn.Module], dict[str, Any]]]:
    """Whether the methods that the arguments name embed; and their learners of a network, by name of their class."""
    name, device = getattr(arguments, "method", "auto"), find_device(arguments.device)
    options = nested(dict(getattr(arguments, "options", [])))
    classes = EMBEDDING_METHODS if name == "auto" else (METHODS[name],)
    for each in classes:
        check_options(made := getattr(methods, each), options, plain_keywords(made))
    embeds = set(classes) <= set(EMBEDDING_METHODS)
    # A method on an embedding keeps the statistics of the pretrained norms.
    keywords = {"norm": "running", **options} if embeds else options
    return embeds, lambda model: {each: getattr(methods, each)(model, **keywords).to(device).eval() for each in classes}


def _network(arguments: Namespace) -> Source:
    source = arguments.source
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
    embeds, make = _methods(arguments)
    if embeds:
        made = make(network.model)
        return Source(lambda ways: made, preprocessing, network.words)
    # Another method learns a new head.
    return Source(
        cache(lambda ways: make(load_network(source, weights, ways=ways).model)), preprocessing, network.words
    )
