"""Fixtures of tests that train: torch's global generators are put back."""

import pytest
import torch

from metawrap.training import train


@pytest.fixture
def tiny_training():
    with torch.random.fork_rng():
        yield


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Trains a run without interruption; returns (folder, result)."""

    def run(settings, **how):
        folder = tmp_path_factory.mktemp("run") / "out"
        with torch.random.fork_rng():
            return folder, train(settings, folder, **how)

    return run
