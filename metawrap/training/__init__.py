"""Runs: epochs, validation, checkpoints, resume, logs, the final test. Read `training_loop.py` first.

From top to bottom; a module imports those below it alone:
study -> comparison -> plots -> run, own_run -> training_loop -> run_evaluation -> loaded_run -> final_evaluation,
insight, tensorboard, inspection -> class_insight, experiment -> callbacks, run_folder -> data_record, run_lock,
checkpoints -> checkpoint_archive -> progress -> machine, tables -> torchrun -> task_sources, stored_files,
named_model -> own_settings -> run_settings.
"""

from metawrap.training.callbacks import Callback, EarlyStopping, TrainingState
from metawrap.training.run import train, train_seeds
from metawrap.training.run_evaluation import evaluate_run
from metawrap.training.run_settings import RunSettings
from metawrap.training.tensorboard import TensorBoard

__all__ = [
    "Callback",
    "EarlyStopping",
    "RunSettings",
    "TensorBoard",
    "TrainingState",
    "evaluate_run",
    "train",
    "train_seeds",
]
