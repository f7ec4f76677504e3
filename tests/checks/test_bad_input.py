"""Bad input is refused by name, and after each refusal the learner is what it was.

Each case of a learner is tried twice: before any task was seen, and on a learner with optimizer state and counters.
"""

from __future__ import annotations

import copy
import random
import re
import warnings
from collections.abc import Callable, Iterator
from dataclasses import replace
from functools import cache
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from bad_input import BATCHES, CALLS, INNER, MODELS, NAN, OUTER, SAMPLERS, SETTINGS, TASKS, WAYS_IN, changed, parts
from face import assert_same_state, fingerprint, unchanged, values_of
from models import NormedMlp, seeded
from torch import Tensor, nn

import metawrap
from metawrap import (
    MAML,
    ArgumentError,
    CheckpointError,
    DataError,
    MAMLPlusPlus,
    MetaWrapWarning,
    ProtoNet,
    Task,
    TaskBatch,
    TaskError,
    UnsupportedModuleError,
)
from metawrap.data import EpisodeSampler, LabelledImages, load_data
from metawrap.settings.keywords import nested
from metawrap.training.run_settings import METHODS, RunSettings


def trained(learner: Any, batch: Any) -> Any:
    learner.meta_step(batch)
    return learner


@cache
def maml(seen: bool) -> Any:
    learner = MAMLPlusPlus(seeded(NormedMlp), inner_steps=2)
    return trained(learner, parts()) if seen else learner


@cache
def proto() -> Any:
    return trained(ProtoNet(seeded(NormedMlp)), parts())


def state_of(learner: Any) -> dict[str, Any]:
    """What a failed call could change: parameters, buffers, flags, optimizer, counters, the global generators."""
    return {
        "module": fingerprint(learner),
        "state": copy.deepcopy(dict(learner.state_dict())),
        "optimizer": copy.deepcopy(learner.optimizer.state_dict()),
        "same optimizer": id(learner.optimizer),
        "iteration": learner.iteration,
        "rng": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": str(np.random.get_state()),
        "grad": torch.is_grad_enabled(),
    }


def assert_refused(learner: Any, call: Callable[[], Any], error: type[BaseException], words: str) -> None:
    before = state_of(learner)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", MetaWrapWarning)
        with pytest.raises(error, match=rf"(?s){words}") as caught:
            call()
    assert type(caught.value) is error
    assert_same_state(state_of(learner), before)


def test_the_table_is_as_long_as_it_says() -> None:
    keywords = sum(map(len, OUTER.values())) + sum(map(len, INNER.values()))
    own = len(BATCHES) + len(CALLS) + len(TASKS) + len(MODELS) + len(SETTINGS) + sum(map(len, SAMPLERS.values()))
    assert keywords + own >= 250


@pytest.mark.parametrize("seen", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("way", WAYS_IN)
@pytest.mark.parametrize("name", BATCHES)
def test_a_bad_batch_is_named_and_changes_nothing(name: str, way: str, seen: bool) -> None:
    make, words = BATCHES[name]
    learner = maml(seen)
    assert_refused(learner, lambda: WAYS_IN[way](learner, make()), TaskError, words)


@pytest.mark.parametrize("name", BATCHES)
def test_a_method_on_an_embedding_refuses_the_same(name: str) -> None:
    make, words = BATCHES[name]
    assert_refused(proto(), lambda: proto().meta_step(make()), TaskError, words)


@pytest.mark.parametrize("seen", [False, True], ids=["fresh", "trained"])
@pytest.mark.parametrize("name", CALLS)
def test_a_bad_call_is_named_and_changes_nothing(name: str, seen: bool) -> None:
    call, error, words = CALLS[name]
    learner = maml(seen)
    assert_refused(learner, lambda: call(learner), error, words)


@pytest.mark.parametrize("name", TASKS)
def test_a_bad_task_is_named(name: str) -> None:
    call, error, words = TASKS[name]
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(
    ("keyword", "value", "words"), [(k, v, w) for k, each in {**OUTER, **INNER}.items() for v, w in each], ids=str
)
def test_a_bad_keyword_is_named_and_the_model_is_untouched(keyword: str, value: Any, words: str) -> None:
    model = seeded(NormedMlp)
    errors = (ArgumentError, UnsupportedModuleError)
    with unchanged(model), pytest.raises(errors, match=rf"{keyword}(.|\n)*({words})|{words}"):
        MAMLPlusPlus(model, **nested({keyword: value}))


@pytest.fixture(params=METHODS)
def method(request: pytest.FixtureRequest) -> Iterator[Any]:
    with warnings.catch_warnings(), torch.random.fork_rng(devices=[]):
        warnings.simplefilter("ignore", MetaWrapWarning)
        yield getattr(metawrap, METHODS[request.param])


def test_every_method_names_a_bad_keyword(method: Any) -> None:
    model = seeded(NormedMlp)
    before = fingerprint(model)
    flat = ("meta_lr", "epochs", "norm", "optimizer")
    for keyword in (*flat, "wrapping.swap", "wrapping.keep_norm", "execution.allocator"):
        value, words = OUTER[keyword][0]
        with pytest.raises(ArgumentError, match=rf"{keyword.removeprefix('wrapping.')}: .*{words}"):
            method(model, **nested({keyword: value}))
    for given, words in [
        ({"inner_step": 5}, "'inner_step'"),
        ({"iteration_per_epoch": 5}, "'iteration_per_epoch'. Did you mean 'iterations_per_epoch'?"),
        ({"execution": {"allocater": 0}}, "'allocater' in execution=. Did you mean execution={\"allocator\": ...}?"),
        ({"max_grad_norm": 1.0}, "'max_grad_norm'. Did you mean outer_update={\"max_grad_norm\": ...}?"),
    ]:
        called = re.escape(f"{method.__name__}() got an unexpected keyword argument {words}")
        with pytest.raises(TypeError, match=f"^{called}"):
            method(model, **given)
    with pytest.raises(ArgumentError, match=r"execution: expected ExecutionOptions or a dict of its fields.* int 5"):
        method(model, execution=5)
    assert fingerprint(model) == before


@pytest.mark.parametrize("name", MODELS)
def test_every_method_names_what_is_no_model(method: Any, name: str) -> None:
    make, kind = MODELS[name]
    with pytest.raises(ArgumentError, match=f"model: expected a torch.nn.Module.*{kind}"):
        method(make())


def test_a_model_with_nothing_to_learn_is_named() -> None:
    for kind in (MAML, MAMLPlusPlus, ProtoNet):
        with pytest.raises(ArgumentError, match="model: Flatten has no parameter"):
            kind(nn.Flatten())


BAD_EVERYWHERE = ("int32 labels", "labels too high", "half for a float64 model", "too few features", "another device")


@pytest.mark.sampled(8)
def test_every_method_refuses_bad_tasks_and_states_and_stays_as_it_was(method: Any) -> None:
    options = {"FineTune": {"classes": 6}, "MultiTask": {"classes": 6}, "LSTMMetaLearner": {"hidden_size": 4}}
    learner = method(seeded(NormedMlp), **options.get(method.__name__, {}))
    for seen in (False, True):
        for name in BAD_EVERYWHERE[method is metawrap.RelationNet :]:  # Its loss is not cross-entropy.
            make, _ = BATCHES[name]
            bad = with_classes(make())
            assert_refused(learner, lambda bad=bad: learner.meta_step(bad), TaskError, "_x|_y")  # type: ignore[misc]
            if name != "labels too high" or method.__name__ != "ZeroStep":  # which never looks at the support labels
                one = bad[0]
                x, y = one.support_x, one.support_y
                assert_refused(learner, lambda x=x, y=y: learner.adapt(x, y), TaskError, "_x|_y")  # type: ignore[misc]
        state = learner.state_dict() | {"model.first.weight": torch.ones(2, 2)}
        assert_refused(learner, lambda s=state: learner.load_state_dict(s), CheckpointError, "first.weight")  # type: ignore[misc]
        if not seen:
            learner.meta_step(with_classes(parts()))


def with_classes(batch: Any) -> TaskBatch:
    tasks = TaskBatch.stacked(*batch)
    return TaskBatch(tuple(replace(t, classes=(3 * i, 3 * i + 1, 3 * i + 2)) for i, t in enumerate(tasks)))


def test_nan_in_training_is_skipped_and_counted_and_changes_nothing_else() -> None:
    learner = copy.deepcopy(maml(True))
    weights = values_of(learner)
    metrics = learner.meta_step(changed(sx=lambda v: v.masked_fill(v == v.max(), NAN)))
    assert metrics.skipped
    assert int(learner.skipped_steps[0]) == 1
    assert all(torch.equal(p, weights[n]) for n, p in learner.named_parameters())


class FillsIn(NormedMlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x.nan_to_num())


def test_a_model_that_takes_nan_for_a_missing_value_may() -> None:
    learner = MAML(seeded(FillsIn), inner_steps=2)
    batch = changed(x=lambda v: v.masked_fill(v > 1, NAN))
    assert not learner.meta_step(batch).skipped
    assert np.isfinite(learner.evaluate(batch).loss)
    assert all(p.isfinite().all() for p in learner.adapt(batch[0][0], batch[1][0]).parameters())


class Broken(NormedMlp):
    def forward(self, x: Tensor) -> Tensor:
        raise RuntimeError("the user's own words")


def test_an_error_of_the_users_own_is_left_alone() -> None:
    with pytest.raises(RuntimeError, match="the user's own words") as caught:
        MAML(Broken().double()).meta_step(parts())
    assert type(caught.value) is RuntimeError


def images() -> LabelledImages:
    labels = torch.arange(4).repeat_interleave(5)
    return LabelledImages(torch.zeros(20, 1, 3, 3, dtype=torch.uint8), labels, tuple("abcd"))


@pytest.mark.parametrize(
    ("keyword", "value", "error", "words"), [(k, *case) for k, each in SAMPLERS.items() for case in each], ids=str
)
def test_a_bad_argument_of_the_sampler_is_named(keyword: str, value: Any, error: Any, words: str) -> None:
    given: dict[str, Any] = {"images": images(), "ways": 2, "shots": 1, "targets": 1} | {keyword: value}
    with pytest.raises(error, match=words):
        EpisodeSampler(**given)


@pytest.mark.parametrize("change", [lambda ids: ids.double(), lambda ids: ids + 20, lambda ids: -1 - ids])
@pytest.mark.parametrize("method", [MAML, ProtoNet])
def test_token_ids_of_the_wrong_kind_are_told_as_a_task(method: Any, change: Callable[[Tensor], Tensor]) -> None:
    layers = [nn.Embedding(20, 2), nn.Flatten(), nn.Linear(10, 4)] if method is MAML else [nn.EmbeddingBag(20, 4)]
    model = nn.Sequential(*layers, nn.Tanh(), nn.Linear(4, 3)).double()
    ids, y = torch.arange(30).view(6, 5) % 20, torch.arange(6) % 3
    method(model).adapt(ids, y)
    with pytest.raises(TaskError, match=r"cannot take this task: .*support_x (int|float)64 \(6, 5\)"):
        method(model).adapt(change(ids), y)


@pytest.mark.parametrize("call", ["meta_step", "adapt", "evaluate"])
def test_a_label_beyond_the_outputs_is_told_as_a_task_under_a_loss_of_the_users_own(call: str) -> None:
    learner = MAML(nn.Linear(5, 3).double(), loss_fn=lambda output, y: F.cross_entropy(output, y))
    x, y = torch.randn(8, 5, dtype=torch.float64), torch.arange(8) % 4
    with pytest.raises(TaskError, match=r"Target 3 is out of bounds\. .*support_y int64 \(8,\).*labels below"):
        getattr(learner, call)(*((x, y) if call == "adapt" else ([Task(x, y, x, y)],)))


@pytest.mark.parametrize("index", [-1, 1.5, "0", None, True])
def test_a_bad_index_of_an_episode_is_named(index: Any) -> None:
    sampler = EpisodeSampler(images(), ways=2)
    with pytest.raises(ArgumentError, match="index: expected an integer of at least 0"):
        sampler.batch(index)
    with pytest.raises(ArgumentError, match="count: expected an integer"):
        sampler.batches(index if index is not None else -1)


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: load_data("nothing"), DataError, "'nothing' is neither"),
        (lambda: load_data("glyphs", colour=True), ArgumentError, "does not take colour"),
        (lambda: load_data("glyphs", root="x"), ArgumentError, "does not take root"),
        (lambda: load_data("omniglot", root="/nowhere"), DataError, "/nowhere"),
        (lambda: LabelledImages(None, None, ()), DataError, "images: .*None"),
        (lambda: replace(images(), images=torch.zeros(20, 1, 3, 3)), DataError, "images: .*uint8.*float32"),
        (lambda: replace(images(), labels=torch.zeros(20)), DataError, "labels: .*int64.*float32"),
        (lambda: replace(images(), labels=images().labels - 1), DataError, "labels: .*from -1"),
        (lambda: replace(images(), labels=images().labels[:3]), DataError, "labels: .*3 labels for 20"),
        (lambda: replace(images(), class_names=tuple("abc")), DataError, "labels: .*0..2"),
        (lambda: replace(images(), class_names=tuple("abcde")), DataError, "class_names: .*'e'"),
        (lambda: images().subset([]), DataError, "class_indices"),
        (lambda: images().subset([0, 0]), DataError, "class_indices"),
        (lambda: images().subset([9]), DataError, "class_indices"),
    ],
)
def test_bad_data_is_named(call: Callable[[], Any], error: type[BaseException], words: str) -> None:
    with pytest.raises(error, match=words):
        call()


@pytest.mark.parametrize(("field", "value", "words"), SETTINGS, ids=str)
def test_a_bad_setting_of_a_run_is_named(field: str, value: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=f"{field}: .*{words}"):
        RunSettings(**{field: value})
    with pytest.raises(CheckpointError, match=f"{field}: .*{words}"):  # as a stored run has it
        RunSettings.from_dict({field: value})
