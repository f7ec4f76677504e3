"""Runs: epochs, validation, checkpoints, resume, logs, the final test. Read `train` in `run.py` first.

From top to bottom; a module imports those below it alone:
study -> comparison -> plots -> run -> run_evaluation -> loaded_run -> final_evaluation, insight, tensorboard,
inspection -> class_insight, experiment -> run_folder -> data_record, run_lock, checkpoints -> checkpoint_archive ->
progress -> machine, tables -> torchrun -> stored_files, named_model -> run_settings.
"""

from metawrap.training.run import train, train_seeds
from metawrap.training.run_evaluation import evaluate_run
from metawrap.training.run_settings import RunSettings

__all__ = ["RunSettings", "evaluate_run", "train", "train_seeds"]
