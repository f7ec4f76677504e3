"""The snippets of docs/own-runs.md for other trackers, each in its own local mode, where the package is installed."""

import json
import re
import warnings
from pathlib import Path

import pytest

from metawrap.training import Callback

PAGE = (Path(__file__).parents[2] / "docs/own-runs.md").read_text()
FIRST = re.search(r"```python\n(.*?)```", PAGE, re.DOTALL)[1]
SNIPPETS = {re.search(r"import (\w+)", code)[1]: code for code in re.findall(r"```py\n(.*?)```", PAGE, re.DOTALL)}

pytestmark = [pytest.mark.usefixtures("tiny_training"), pytest.mark.slow]


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Runs the page's first snippet up to its run, and the tracker's; returns the names."""

    def run(package):
        pytest.importorskip(package, reason=f"pip install {package} for its snippet in docs/own-runs.md")
        monkeypatch.chdir(tmp_path)
        names = {"Callback": Callback}
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # The packages' own.
            exec(FIRST.partition("result =")[0] + SNIPPETS[package], names)
        return names

    return run


def test_wandb_gets_each_epoch_of_an_offline_run(ran, tmp_path, monkeypatch):
    wandb = pytest.importorskip("wandb")
    logged, real = [], wandb.Run.log
    monkeypatch.setattr(
        wandb.Run, "log", lambda run, record, step: logged.append(record) or real(run, record, step=step)
    )
    ran("wandb")
    assert logged == [json.loads(line) for line in (tmp_path / "runs/wandb/log.jsonl").read_text().splitlines()]
    assert len(list(tmp_path.glob("runs/wandb/wandb/offline-run-*/run-wandb.wandb"))) == 1


def test_mlflow_has_each_epoch_of_a_finished_run(ran):
    mlflow = ran("mlflow")["mlflow"]
    [run] = mlflow.search_runs(output_format="list")
    points = mlflow.MlflowClient().get_metric_history(run.info.run_id, "validation_accuracy")
    assert [point.step for point in points] == [1, 2, 3]
    assert run.info.status == "FINISHED"
    assert run.data.params == {"method": "MAMLPlusPlus", "epochs": "3"}


def test_optuna_gets_each_epoch_and_can_prune(ran):
    names = ran("optuna")
    optuna, study = names["optuna"], names["study"]
    assert [list(trial.intermediate_values) for trial in study.trials] == [[1, 2]] * 3
    strict = optuna.create_study(pruner=optuna.pruners.ThresholdPruner(lower=2.0))
    for folder in Path("runs").glob("trial-*"):
        folder.rename(folder.with_name(f"kept-{folder.name}"))
    strict.optimize(names["objective"], n_trials=1)
    assert [trial.state.name for trial in strict.trials] == ["PRUNED"]
    assert not Path("runs/trial-0/result.json").exists()
    assert Path("runs/trial-0/checkpoints/epoch-0001.pt").exists()
