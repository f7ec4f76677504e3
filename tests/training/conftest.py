"""Fixtures of tests that train: data loaded once, torch's global generators put back."""

import functools

import pytest
import torch

import metawrap.training.experiment
from metawrap.training import train


@pytest.fixture(scope="session")
def loaded_once():
    return functools.lru_cache(metawrap.training.experiment.load_data)


@pytest.fixture
def tiny_training(monkeypatch, loaded_once):
    monkeypatch.setattr(metawrap.training.experiment, "load_data", loaded_once)
    with torch.random.fork_rng():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory, loaded_once):
    """Trains a run without interruption; returns (folder, result)."""

    def run(settings, **how):
        folder = tmp_path_factory.mktemp("run") / "out"
        with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
            patch.setattr(metawrap.training.experiment, "load_data", loaded_once)
            return folder, train(settings, folder, **how)

    return run
