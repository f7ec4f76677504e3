"""The authors' values, through the public face with every engine, and the oracle that wrote the small file."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from face import assert_same_values, gradients_of, statistics_of
from keywords import grouped
from make_golden import PATH, make
from models import Conv4
from oracle import assert_same_gradients, conv4_meta_gradient, meta_gradient, msl_weights

from metawrap import MAMLPlusPlus

SHARED = sorted((Path(__file__).parents[2].parent / "shared/data/golden").glob("*.npz"))
FILES = pytest.mark.parametrize("path", [PATH, *SHARED], ids=lambda path: path.stem)
PARTS = ("support_x", "support_y", "target_x", "target_y")


def _load(path: Path) -> SimpleNamespace:
    groups: dict[str, dict[str, torch.Tensor]] = {"": {}, "init": {}, "grad": {}, "after": {}}
    with np.load(path) as arrays:
        for key in arrays.files:
            group, _, name = key.partition("/") if "/" in key else ("", "", key)
            groups[group][name] = torch.from_numpy(np.asarray(arrays[key]))
    head, init, grad = groups[""], groups["init"], groups["grad"]
    steps = len(head["step_weights"])
    statistics = {name: value for name, value in init.items() if "running_" in name}
    return SimpleNamespace(
        steps=steps,
        loss=head["loss"],
        accuracy=float(head["accuracy"]),
        logits=head["logits_last"],
        batch=tuple(head[name] for name in PARTS),
        last_step_only="last_step" in path.stem,
        weights=[0.0] * (steps - 1) + [1.0] if "last_step" in path.stem else head["step_weights"].tolist(),
        rates={name[3:]: value[:steps] for name, value in init.items() if name.startswith("lr/")},
        statistics=statistics,
        values={name: v for name, v in init.items() if name not in statistics and not name.startswith("lr/")},
        gradients={name: value[:steps] if name.startswith("lr/") else value for name, value in grad.items()},
        after=groups["after"],
    )


def _network(file: SimpleNamespace) -> Conv4:
    filters, ways = file.values["conv0.conv.weight"].shape[0], file.values["linear.weight"].shape[0]
    return Conv4(filters, ways, size=file.batch[0].shape[-1]).double()


def _learner(file: SimpleNamespace, **options: object) -> MAMLPlusPlus:
    learner = MAMLPlusPlus(
        _network(file), inner_steps=file.steps, preset="authors_code", msl_epochs=10, **grouped(**options)
    )
    parameters, buffers = dict(learner.model.named_parameters()), dict(learner.model.named_buffers())
    assert set(parameters) == set(file.values)
    with torch.no_grad():
        for name, value in file.values.items():
            parameters[name].copy_(value)
        for name, value in file.statistics.items():
            buffers[name].copy_(value)
        for name, value in file.rates.items():
            learner.learning_rates[name].copy_(value)
    learner.epoch = 50 if file.last_step_only else 3
    return learner


@pytest.mark.sampled(2)
@pytest.mark.parametrize("engine", ["functional", "higher", "batched"])
@FILES
def test_meta_step_reproduces_the_reference_file(path: Path, engine: str) -> None:
    file = _load(path)
    learner = _learner(file, engine=engine)
    metrics = learner.meta_step(file.batch)
    assert metrics.loss == pytest.approx(float(file.loss), rel=1e-9, abs=0)
    assert float(metrics.accuracy) == pytest.approx(file.accuracy, abs=1e-6)
    assert_same_gradients(gradients_of(learner), file.gradients)
    assert_same_gradients(statistics_of(learner), file.after)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("engine", ["functional", "higher", "batched"])
@FILES
def test_forward_and_backward_reproduce_the_reference_file(path: Path, engine: str) -> None:
    file = _load(path)
    learner = _learner(file, engine=engine)
    output = learner(file.batch)
    output.loss.backward()
    torch.testing.assert_close(output.loss.detach(), file.loss, rtol=1e-9, atol=0)
    assert_same_values(output.predictions, file.logits)
    assert_same_gradients(gradients_of(learner), file.gradients)


@pytest.mark.parametrize("engine", ["functional", "higher", "batched"])
@FILES
def test_evaluation_predicts_the_reference_logits(path: Path, engine: str) -> None:
    file = _load(path)
    learner = _learner(file, engine=engine).eval()
    assert_same_values(learner(file.batch).predictions, file.logits)
    for index in range(len(file.logits)):
        adapted = learner.adapt(file.batch[0][index], file.batch[1][index])
        assert_same_values([adapted(file.batch[2][index]).detach()], file.logits[index : index + 1])
    assert_same_gradients(statistics_of(learner), file.statistics)


@pytest.mark.parametrize("form", ["any module", "unrolled"])
@FILES
def test_oracle_reproduces_the_reference_file(path: Path, form: str) -> None:
    file = _load(path)
    tasks = list(zip(*file.batch, strict=True))
    if form == "unrolled":
        result = conv4_meta_gradient(tasks, file.values, file.rates, file.statistics, file.weights)
    else:
        result = meta_gradient(
            _network(file),
            tasks,
            rates=file.rates,
            step_weights=file.weights,
            values=file.values,
            statistics=file.statistics,
        )
    torch.testing.assert_close(result.loss, file.loss, rtol=1e-9, atol=0)
    assert_same_values(result.predictions, file.logits)
    assert_same_gradients(result.gradients, file.gradients)
    assert_same_gradients(result.statistics, file.after)


def test_small_reference_file_is_what_its_generator_writes() -> None:
    fresh = make()
    with np.load(PATH) as stored:
        assert set(stored.files) == set(fresh)
        for name in stored.files:
            np.testing.assert_allclose(stored[name], fresh[name], rtol=1e-8, atol=1e-12, err_msg=name)


def test_oracle_step_weights_are_those_of_the_authors() -> None:
    np.testing.assert_allclose(msl_weights(5, 3, 10), [0.14, 0.14, 0.14, 0.14, 0.44], rtol=1e-12)
