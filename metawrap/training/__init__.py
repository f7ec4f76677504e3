"""Runs: epochs, validation, checkpoints, resume, logs, the final test. Read `train` in `run.py` first."""

from metawrap.training.run import evaluate_run, train, train_seeds
from metawrap.training.run_settings import RunSettings

__all__ = ["RunSettings", "evaluate_run", "train", "train_seeds"]
