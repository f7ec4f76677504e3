"""What every method promises, whatever it does inside: one contract, every method of the command line.

`name` is a method. `case` is a method, or a variant of one whose options, tasks or network run other code.
"""

from __future__ import annotations

import copy
import doctest
import importlib
import inspect
import pickle
import re
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import NETWORKS, VARIANTS, batch_of, keywords, make, network, quiet
from face import assert_same_state, fingerprint, snapshot
from method_cases import numbers
from models import NormedMlp, seeded
from torch import Tensor, nn

import metawrap
from metawrap import ArgumentError, MetaWrapError, Task, TaskError, methods
from metawrap.settings.keywords import keyword_types
from metawrap.training.run_settings import METHODS

NORMS = ("batch", "running", "support")
INNER_STEPS = {"maml++", "maml", "fomaml", "meta-sgd", "anil", "boil", "reptile", "lstm", "fine-tune", "multi-task"}
# Their head is fitted to embeddings, and has one output for each class of the task.
FITTED = [name for name in METHODS if name not in INNER_STEPS | {"zero-step"}]
FITTED += [name for name in VARIANTS if name.split("-")[0] in FITTED]
# They fit the user's own head.
OWN_HEAD = {"anil", "fine-tune", "multi-task"}
# Differ from the method in what they do with a new task only.
TRAINED_ALIKE = {"fine-tune-full"}
# Their learned weights belong to a class's number.
NUMBERED = {"mann", "metanet"}
# Their gradient leaves out second derivatives, or treats support gradients as constants.
PARTIAL_GRADIENT = {"fomaml", "reptile", "lstm", "metanet"}
# Modules of methods whose docstring has an example.
EXAMPLES = sorted(
    {
        getattr(methods, METHODS[n]).__module__.split(".")[-1]
        for n in [*FITTED, "anil", "boil", "fine-tune", "multi-task", "zero-step"]
        if n in METHODS
    }
)
# Chance by construction.
LEARNS_NOTHING = {"zero-step"}
# Draws random numbers in training.
DRAWS = {"statistician"}


def uneven(case: str, ways: int = 3, shape: tuple[int, ...] = (4,)) -> Task:
    """A task with way + 1 support examples of each way, and two targets."""
    labels, asked = torch.arange(ways).repeat_interleave(torch.arange(ways) + 1), torch.arange(ways).repeat(2)
    x, y = numbers(len(labels), *shape), numbers(len(asked), *shape, seed=1)
    return replace(batch_of(case, 1, ways=ways)[0], support_x=x, support_y=labels, target_x=y, target_y=asked)


def predictions(learner: Any, task: Task) -> Tensor:
    torch.manual_seed(5)
    return learner.evaluate([task], keep_predictions=True).predictions[0]  # type: ignore[no-any-return]


def gradients(learner: Any) -> dict[str, Tensor | None]:
    return {name: None if p.grad is None else p.grad.clone() for name, p in learner.named_parameters()}


def assert_close(found: dict[str, Tensor | None], expected: dict[str, Tensor | None], tolerance: float = 1e-9) -> None:
    assert found.keys() == expected.keys()
    scale = max(float(g.abs().max()) for g in expected.values() if g is not None)
    for name, gradient in expected.items():
        zero = torch.zeros(()) if gradient is None else torch.zeros_like(gradient)
        one, other = (zero if g is None else g for g in (found[name], gradient))
        assert float((one - other).abs().max()) <= tolerance * scale, name


@pytest.fixture(params=METHODS)
def name(request: pytest.FixtureRequest) -> Iterator[str]:
    with quiet():
        yield request.param


@pytest.fixture(params=[name for name in [*METHODS, *VARIANTS] if name not in TRAINED_ALIKE])
def case(request: pytest.FixtureRequest) -> Iterator[str]:
    with quiet():
        yield request.param


@pytest.fixture(params=[*METHODS, *VARIANTS])
def deployed(request: pytest.FixtureRequest) -> Iterator[str]:
    with quiet():
        yield request.param


@pytest.fixture(params=FITTED)
def fitted(request: pytest.FixtureRequest) -> Iterator[str]:
    with quiet():
        yield request.param


def test_every_method_that_is_exported_can_be_named_on_the_command_line() -> None:
    classes = {n for n, value in vars(methods).items() if inspect.isclass(value) and issubclass(value, methods.Learner)}
    abstract = {n for n in classes if inspect.isabstract(getattr(methods, n))}
    assert classes - abstract == set(METHODS.values())
    assert set(METHODS.values()) <= set(metawrap.__all__)


def test_it_names_its_source(name: str) -> None:
    text = inspect.getdoc(getattr(methods, METHODS[name])) or ""
    assert name in LEARNS_NOTHING or re.search(r"\b(19|20)\d\d\b", text), "a paper, with its year"


def test_its_keywords_are_known_and_a_wrong_one_is_refused(name: str) -> None:
    assert {"meta_lr", "norm", "loss_fn", "optimizer"} <= set(keyword_types(getattr(methods, METHODS[name])))
    for wrong in ("meta_rl", "parts", *(() if name in INNER_STEPS else ("inner_steps",))):
        with pytest.raises(TypeError, match=wrong):
            make(name, **{wrong: 0.1})
    if name in FITTED or name in OWN_HEAD | {"zero-step"}:
        words = rf"{METHODS[name]}\(\) got an unexpected keyword argument 'meta_ls'.*Did you mean 'meta_lr'"
        with pytest.raises(TypeError, match=words):
            make(name, meta_ls=1)


def test_the_users_module_is_never_changed(name: str) -> None:
    model, batch = seeded(NormedMlp), batch_of()
    before = fingerprint(model)
    learner = make(name, model)
    learner.meta_step(batch)
    learner.evaluate(batch)
    learner.adapt(batch[0].support_x, batch[0].support_y)
    assert fingerprint(model) == before
    mine = {id(p) for p in model.parameters()} | {id(b) for b in model.buffers()}
    assert not mine & {id(t) for t in (*learner.parameters(), *learner.buffers())}


@pytest.mark.sampled(2)
def test_it_learns_tasks_by_heart(case: str) -> None:
    if case in NETWORKS or case == "anil-rates":  # See test_anil.py.
        return
    batch = batch_of(case)
    slow = {"mann": (65, 0.02), "statistician": (65, 0.02), "reptile": (40, 0.05)}
    steps, rate = slow.get(case, (30, 0.05))
    learner = make(case, meta_lr=rate)
    before = copy.deepcopy(dict(learner.named_parameters()))
    losses = [learner.meta_step(batch).loss for _ in range(steps)]
    first, last = losses[:5], losses[-5:]
    share = 0.999 if case in LEARNS_NOTHING else 0.8
    assert sum(last) < (share * sum(first) if sum(first) > 0 else sum(first))
    assert any(not torch.equal(p, before[n]) for n, p in learner.named_parameters() if n in before)


@pytest.mark.sampled(7)
def test_backward_of_forward_is_the_gradient_of_meta_step(case: str) -> None:
    batch, one = batch_of(case), make(case, optimizer=lambda p: torch.optim.SGD(p, lr=0.0))
    torch.manual_seed(3)
    loss = one.meta_step(batch).loss
    other = make(case)
    torch.manual_seed(3)
    output = other(batch)
    output.loss.backward()
    assert float(output.loss.detach()) == pytest.approx(loss, rel=1e-9)
    assert_close(gradients(other), gradients(one))


@pytest.mark.sampled(2)
def test_a_batch_is_the_mean_of_its_tasks_whatever_the_chunks(case: str) -> None:
    def gradient(tasks: list[Task], **options: Any) -> dict[str, Tensor | None]:
        learner = make(case, optimizer=lambda p: torch.optim.SGD(p, lr=0.0), **options)
        torch.manual_seed(3)
        learner.meta_step(tasks)
        return gradients(learner)

    batch = batch_of(case)
    whole = gradient(batch)
    for size in (2, 3):
        assert_close(gradient(batch, tasks_per_backward=size), whole)
    if case.split("-")[0] in DRAWS or case.endswith("growing"):
        return  # One task alone does not draw the numbers, or the table, that it gets as the second.
    each = [gradient([task]) for task in batch]
    found = {n: [g[n] for g in each if g.get(n) is not None] for n in whole}
    assert_close({n: sum(parts) / len(each) if parts else None for n, parts in found.items()}, whole)  # type: ignore[arg-type]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("norm", NORMS)
def test_adapt_predicts_as_evaluate_does(deployed: str, norm: str) -> None:
    if (deployed, norm) == ("reptile", "running"):
        return  # Refused: see tests/inner_loop/test_running_shifts.py.
    learner, batch = make(deployed, norm=norm), batch_of(deployed)
    for _ in range(3):
        learner.meta_step(batch)
    task = replace(batch[0], id=None)
    for steps in (None, 0, 7) if VARIANTS.get(deployed, (deployed,))[0] in INNER_STEPS else (None,):
        torch.manual_seed(5)
        result = learner.evaluate([task], keep_predictions=True, steps=steps)
        torch.manual_seed(5)
        module = learner.adapt(task.support_x, task.support_y, steps=steps)
        shared = {id(t) for t in (*learner.parameters(), *learner.buffers())}
        assert not shared & {id(t) for t in (*module.parameters(), *module.buffers())}
        assert not any(p.grad is not None for p in module.parameters())
        # A part of a larger tensor would be saved with all of it.
        assert not [n for n, t in module.state_dict().items() if t.untyped_storage().nbytes() != t.nbytes]
        module = pickle.loads(pickle.dumps(module))
        assert not module.training
        assert not any(isinstance(m, methods.Learner) for m in module.modules())
        with torch.no_grad():
            found = module(task.target_x)
        expected = result.predictions[0]
        assert torch.equal(found.argmax(1), expected.argmax(1))
        torch.testing.assert_close(found, expected, rtol=1e-9, atol=1e-9)
    if norm == "batch":
        with quiet():
            expected = learner.evaluate([task], keep_predictions=True, norm="support").predictions[0]
            torch.manual_seed(1)
            module = learner.adapt(task.support_x, task.support_y, norm="support")
        with torch.no_grad():
            torch.testing.assert_close(module(task.target_x), expected, rtol=1e-9, atol=1e-9)
            alone = module(task.target_x[:1])
        torch.testing.assert_close(alone, expected[:1], rtol=1e-9, atol=1e-9)
        assert steps is None or result.steps == steps


@pytest.mark.sampled(13)
@pytest.mark.parametrize("norm", ["running", "support"])
def test_a_target_is_judged_alone_as_in_company(deployed: str, norm: str) -> None:
    if (deployed, norm) == ("reptile", "running"):
        return  # Refused: see tests/inner_loop/test_running_shifts.py.
    learner, task = make(deployed, norm=norm), batch_of(deployed)[0]
    learner.meta_step([task])
    together = predictions(learner, task)
    for index in range(2):
        one = slice(index, index + 1)
        alone = Task(task.support_x, task.support_y, task.target_x[one], task.target_y[one], task.id)  # type: ignore[index]
        torch.testing.assert_close(predictions(learner, alone), together[one], rtol=1e-9, atol=1e-9)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("name", sorted(INNER_STEPS))
def test_what_adapt_returns_predicts_an_image_alone_as_in_company_by_default(name: str) -> None:
    def difference(images: int, **options: Any) -> float:
        learner, batch = make(name, **options), batch_of(name)
        learner.meta_step(batch)
        x = batch[0].target_x
        module = learner.adapt(batch[0].support_x, batch[0].support_y)
        with torch.no_grad():
            return float((module(x)[:images] - module(x[:images])).abs().max())  # type: ignore[index]

    assert difference(1) < 1e-10
    assert difference(2, norm="batch") > 1e-3  # The network has norms that matter.


@pytest.mark.sampled(5)
@pytest.mark.parametrize("training", [True, False])
def test_evaluating_changes_nothing(deployed: str, training: bool) -> None:
    learner, batch = make(deployed), batch_of(deployed)
    learner.meta_step(batch)
    learner.train(training)
    learner.evaluate(batch)  # The first look in this mode.
    before, state = fingerprint(learner), snapshot(dict(learner.state_dict()))
    optimizer = snapshot(learner.optimizer.state_dict())
    with torch.inference_mode():
        learner.evaluate(batch)
        learner.adapt(batch[0].support_x, batch[0].support_y)
    for norm in NORMS:
        learner.evaluate(batch, norm=norm)
    learner.unwrap()
    str(learner.describe())
    if not training:
        learner(batch)
    assert fingerprint(learner) == before
    assert_same_state(dict(learner.state_dict()), state)
    assert_same_state(learner.optimizer.state_dict(), optimizer)
    assert learner.training is training
    random = torch.random.get_rng_state()
    assert learner.evaluate(batch).loss == learner.evaluate(batch).loss
    assert torch.equal(torch.random.get_rng_state(), random)


@pytest.mark.sampled(5)
def test_a_fresh_learner_takes_a_trained_ones_state_before_any_task(case: str) -> None:
    learner, batch = make(case), batch_of(case)
    for tasks in (batch[1:2], batch[:1]):
        learner.meta_step(tasks)
    fresh = make(case, network(case, seed=9))
    fresh.load_state_dict(learner.state_dict())
    fresh.optimizer.load_state_dict(snapshot(learner.optimizer.state_dict()))
    assert_same_state(dict(fresh.state_dict()), dict(learner.state_dict()))
    for task in batch:
        assert torch.equal(predictions(fresh, task), predictions(learner, task))
    for one in (learner, fresh):
        torch.manual_seed(6)
        one.meta_step(batch)
    assert_same_state(dict(fresh.state_dict()), dict(learner.state_dict()))


@pytest.mark.sampled(14)
def test_its_state_is_plain_tensors_before_any_task_too(name: str, tmp_path: Path) -> None:
    learner = make(name)
    torch.save(learner.state_dict(), tmp_path / "state.pt")
    fresh = make(name, seeded(NormedMlp, seed=9))
    fresh.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    assert torch.equal(fresh.model.first.weight, learner.model.first.weight)


@pytest.mark.sampled(5)
@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("way", [copy.deepcopy, lambda learner: pickle.loads(pickle.dumps(learner))])
def test_a_copy_learns_as_the_learner_does_and_apart_from_it(case: str, trained: bool, way: Any) -> None:
    learner, batch = make(case), batch_of(case)
    if trained:
        learner.meta_step(batch[1:2])
    twin = way(learner)
    before = fingerprint(learner)
    losses = []
    for one in (twin, learner):
        assert one is twin or fingerprint(learner) == before
        torch.manual_seed(4)
        losses.append([one.meta_step(batch).loss for _ in range(2)])
    assert losses[0] == losses[1]
    assert {p.dtype for p in twin.parameters()} == {torch.float64}
    assert_same_state(dict(twin.state_dict()), dict(learner.state_dict()))


def test_unwrap_is_the_users_own_class_and_runs(name: str) -> None:
    learner, batch = make(name), batch_of()
    learner.meta_step(batch)
    plain = learner.unwrap()
    assert type(plain) is NormedMlp
    assert [n for n, _ in plain.named_parameters()] == [n for n, _ in seeded(NormedMlp).named_parameters()]
    assert plain(batch[0].target_x).shape == (6, 3)


@pytest.mark.sampled(6)
def test_it_describes_itself_before_and_after_a_task(name: str) -> None:
    learner = make(name)
    for _ in range(2):
        description = learner.describe()
        assert METHODS[name] in str(description)
        assert "NormedMlp" in str(description)
        assert description.to_dict()["method"]
        assert description._repr_html_()
        learner.meta_step(batch_of())
    assert learner.describe().head in ("linear", None)


@pytest.mark.sampled(11)
def test_a_frozen_parameter_stays_frozen(name: str) -> None:
    model = seeded(NormedMlp)
    model.get_parameter("first.weight").requires_grad_(False)
    learner, batch = make(name, model), batch_of()
    before = learner.model.first.weight.detach().clone()
    for _ in range(2):
        learner.meta_step(batch)
    assert torch.equal(learner.model.first.weight, before)


@pytest.mark.sampled(10)
def test_a_step_that_is_not_finite_is_skipped_and_counted(name: str) -> None:
    learner, batch = make(name), batch_of()
    learner.meta_step(batch)
    weights = {n: p.detach().clone() for n, p in learner.named_parameters()}
    statistics = {n: b.detach().clone() for n, b in learner.model.named_buffers()}
    broken = [batch[0], batch[1].map(lambda t: torch.full_like(t, torch.inf) if t.is_floating_point() else t)]
    assert learner.meta_step(broken).skipped
    assert int(learner.skipped_steps[0]) == 1
    for n, p in learner.named_parameters():
        assert torch.equal(p, weights[n]), n
    for n, b in learner.model.named_buffers():
        assert torch.equal(b, statistics[n]), n
    assert not learner.meta_step(batch).skipped


@pytest.mark.sampled(13)
def test_a_failed_call_leaves_it_as_it_was(name: str) -> None:
    learner, batch = make(name), batch_of()
    learner.meta_step(batch)
    before, state = fingerprint(learner), snapshot(dict(learner.state_dict()))
    task = batch[0]
    wrong = replace(task, target_y=task.target_y + 7)
    with pytest.raises(MetaWrapError, match=r"target_y"):
        learner.meta_step([batch[1], wrong])
    assert fingerprint(learner) == before
    assert_same_state(dict(learner.state_dict()), state)


# With three examples of each class, a linear system has the other of its two forms.
@pytest.mark.sampled(6)
@pytest.mark.parametrize(
    ("case", "shots"),
    [(c, 1) for c in [*METHODS, *VARIANTS] if c not in PARTIAL_GRADIENT and c not in NETWORKS]
    + [(c, 3) for c in ("protonet", "r2d2", "metaoptnet", "metaoptnet-ridge")],
)
def test_the_gradient_of_every_parameter_is_that_of_differences(case: str, shots: int) -> None:
    with quiet():
        learner, batch = make(case, norm="support"), batch_of(case, 2, shots=shots)
        torch.manual_seed(3)
        learner(batch).loss.backward()
        found = {n: p for n, p in learner.named_parameters() if p.grad is not None}
        without = {n.rpartition(".")[0] for n, p in learner.named_parameters() if p.requires_grad and p.grad is None}
        assert without <= {"model.linear"}, "only a head that is not run has no gradient"
        for name, parameter in found.items():
            flat, values = parameter.data.view(-1), []
            index = len(flat) // 2
            for sign in (1, -1):
                flat[index] += sign * 1e-6
                torch.manual_seed(3)
                values.append(float(learner(batch).loss.detach()))
                flat[index] -= sign * 1e-6
            expected, gradient = (values[0] - values[1]) / 2e-6, float(parameter.grad.view(-1)[index])  # type: ignore[union-attr]
            assert abs(gradient - expected) <= 1e-7 * max(1.0, abs(expected)), (name, gradient, expected)


@pytest.mark.sampled(9)
@pytest.mark.parametrize("ways", [2, 7])
def test_any_number_of_ways_and_uneven_classes(case: str, ways: int) -> None:
    if case in NETWORKS:
        return
    table = case.startswith(("fine-tune", "multi-task")) and not case.endswith(("ids", "own-labels"))
    outputs = 3 if case in FITTED or table else ways  # The head of the network has no part in training.
    learner, task = make(case, seeded(lambda: NormedMlp(ways=outputs)), meta_lr=0.02), uneven(case, ways)
    losses = [learner.meta_step([task]).loss for _ in range(30 if VARIANTS.get(case, (case,))[0] in OWN_HEAD else 1)]
    assert len(losses) == 1 or losses[-1] < 0.8 * losses[0]
    if case in FITTED:
        assert predictions(learner, task).shape == (2 * ways, ways)
        assert learner.adapt(task.support_x, task.support_y)(task.target_x).shape == (2 * ways, ways)
    if case in FITTED and case.split("-")[0] not in NUMBERED:
        assert torch.isfinite(torch.tensor(learner.meta_step([uneven(case, 1)]).loss))


def test_permuted_labels_permute_the_logits(fitted: str) -> None:
    if fitted in NETWORKS or fitted in NUMBERED:
        return
    learner, task, order = make(fitted), uneven(fitted), torch.tensor([2, 0, 1])
    learner.meta_step([task])
    turned = replace(task, support_y=order[task.support_y], target_y=order[task.target_y])
    torch.testing.assert_close(
        predictions(learner, turned)[:, order], predictions(learner, task), rtol=1e-9, atol=1e-12
    )


@pytest.mark.sampled(11)
def test_ignored_targets_do_not_count(case: str) -> None:
    task = batch_of(case, 1)[0]
    hidden = replace(task, target_y=task.target_y.clone().index_fill_(0, torch.tensor([0]), -100))
    without = replace(task, target_x=task.target_x[1:], target_y=task.target_y[1:])
    one, other = make(case, norm="support"), make(case, norm="support")
    assert one.evaluate([hidden]).loss == pytest.approx(other.evaluate([without]).loss, rel=1e-9)
    if case.split("-")[0] not in DRAWS | {"reptile"}:  # Reptile draws batches from support and target set together.
        assert one.meta_step([hidden]).loss == pytest.approx(other.meta_step([without]).loss, rel=1e-9)


@pytest.mark.sampled(11)
@pytest.mark.parametrize("trained", [False, True])
def test_precision_follows(case: str, trained: bool) -> None:
    learner, batch = make(case, network(case).float()), batch_of(case)
    if trained:
        learner.meta_step([task.map(lambda t: t.float() if t.is_floating_point() else t) for task in batch])
    learner.double().meta_step(batch)
    assert {p.dtype for p in learner.parameters()} == {torch.float64}
    module = learner.adapt(batch[0].support_x, batch[0].support_y)
    found = [(name, b.dtype) for name, b in module.named_buffers() if b.is_floating_point()]
    assert {dtype for name, dtype in found if not name.endswith(".ages")} <= {torch.float64}  # Ages count.
    assert module.float()(batch[0].target_x.float()).dtype == torch.float32


def test_regression_and_missing_classes_are_refused_where_a_head_is_fitted(fitted: str) -> None:
    learner, task = make(fitted), batch_of(fitted)[0]
    x, y = task.support_x, numbers(len(task.support_y))
    with pytest.raises(TaskError, match="support_y"):
        learner.meta_step([Task(x, y, x, y)])
    with pytest.raises(TaskError, match=r"support_y: \w+ needs each class from 0"):
        learner.meta_step([replace(task, support_y=task.support_y + 1)])


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", ["maml", "anil", "anil-rates", "reptile", "fine-tune-own-labels", "multi-task-ids"])
def test_regression_with_the_users_loss(case: str) -> None:
    with quiet():
        model = nn.Sequential(nn.Linear(1, 8), nn.Tanh(), nn.Linear(8, 1)).double()
        x = torch.linspace(-1, 1, 8, dtype=torch.float64)[:, None]
        batch = [Task(x, a * x, x, a * x, id=int(10 * a)) for a in (1.0, 0.8 if "own" in case else -1.0)]
        learner = make(case, model, loss_fn=F.mse_loss, **({} if case == "reptile" else {"meta_lr": 0.02}))
        losses = [learner.meta_step(batch).loss for _ in range(60)]
        assert losses[-1] < 0.5 * losses[0]
        found = learner.adapt(x, batch[0].support_y)(x).detach()
        torch.testing.assert_close(found, predictions(learner, replace(batch[0], id=None)), rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("name", [n for n in METHODS if n in FITTED or n in OWN_HEAD | {"zero-step"}])
def test_calls_without_effect_are_refused(name: str) -> None:
    learner, [task, *_] = make(name), batch_of()
    with pytest.raises(ArgumentError, match=rf"mask_unused_outputs: .*{METHODS[name]}"):
        learner.evaluate([task], mask_unused_outputs=True)
    fits = name in INNER_STEPS
    with pytest.raises(
        ArgumentError, match=r"steps: expected a whole number" if fits else r"steps: has no effect on \w+"
    ):
        learner.evaluate([task], steps=-1 if fits else 1)
    with pytest.raises(
        ArgumentError, match=r"steps: expected a whole number" if fits else r"steps: has no effect on \w+"
    ):
        learner.adapt(task.support_x, task.support_y, steps=-1 if fits else 3)


@pytest.mark.parametrize(
    ("name", "options", "words"),
    [
        ("anil", {"inner_steps": 0}, r"inner_steps: expected a whole number of at least 1"),
        ("anil", {"inner_lr": "fast"}, r"inner_lr: expected a finite number"),
        ("anil", {"learn_inner_lr": 1}, r"learn_inner_lr: expected True or False"),
        ("anil", {"first_order": "yes"}, r"first_order: expected True or False"),
        ("anil", {"embedding": "output"}, r"embedding: ANIL fits the head"),
        ("anil", {"head": "nowhere"}, r"head: expected the name of a submodule"),
        ("fine-tune", {"tune": "body"}, r"tune: expected 'full' or 'head', but got 'body'"),
        ("fine-tune", {"inner_steps": 0}, r"inner_steps: expected a whole number of at least 1"),
        ("fine-tune", {"inner_lr": None}, r"inner_lr: expected a positive number"),
        ("fine-tune", {"inner_lr": -0.1}, r"inner_lr: expected a positive number, but got -0.1"),
        ("fine-tune", {"inner_lr": 0}, r"inner_lr: expected a positive number"),
        ("fine-tune", {"inner_optimizer": "lbfgs"}, r"inner_optimizer: expected 'sgd' or 'adam'"),
        ("fine-tune", {"classes": 0}, r"classes: expected a whole number of at least 1"),
        ("fine-tune", {"embedding": "output"}, r"embedding: FineTune fits the head"),
        ("multi-task", {"inner_steps": 0}, r"inner_steps: expected a whole number of at least 1"),
        ("multi-task", {"inner_lr": "x"}, r"inner_lr: expected a positive number"),
        ("multi-task", {"inner_lr": -0.1}, r"inner_lr: expected a positive number, but got -0.1"),
        ("multi-task", {"inner_optimizer": "lbfgs"}, r"inner_optimizer: expected 'sgd' or 'adam'"),
        ("multi-task", {"classes": True}, r"classes: expected a whole number of at least 1"),
        ("multi-task", {"embedding": "output"}, r"embedding: MultiTask fits the head"),
        ("protonet", {"distance": "manhattan"}, r"distance: expected 'euclidean' or 'cosine', but got 'manhattan'"),
        ("protonet", {"embedding": "input"}, r"embedding: expected 'head_input' or 'output'"),
        ("protonet", {"embedding": "output", "head": "linear"}, r"head: has no effect"),
        ("protonet", {"head": "nothing"}, r"head: expected the name of a submodule"),
        ("protonet", {"norm": "layer"}, r"norm: expected 'batch', 'running', 'support', 'task' or 'task_layer'"),
        ("protonet", {"meta_lr": -1.0}, r"meta_lr: expected a positive number"),
        ("protonet", {"loss_fn": None}, r"loss_fn: expected a function"),
        ("protonet", {"loss_fn": 3}, r"loss_fn: expected a function"),
        ("r2d2", {"regularizer": 0.0}, r"regularizer: expected a positive number, but got 0\.0"),
        ("r2d2", {"regularizer": "much"}, r"regularizer: expected a positive number, but got 'much'"),
        ("r2d2", {"scale": -1}, r"scale: expected a positive number, but got -1"),
        ("r2d2", {"scale": float("nan")}, r"scale: expected a positive number"),
        ("simpleshot", {"scale": 0}, r"scale: expected a positive number, but got 0"),
        ("logistic", {"regularizer": -1.0}, r"regularizer: expected a positive number, but got -1\.0"),
        ("metaoptnet", {"solver": "lasso"}, r"solver: expected 'svm' or 'ridge', but got 'lasso'"),
        ("metaoptnet", {"regularizer": 0}, r"regularizer: expected a positive number, but got 0"),
        ("metaoptnet", {"scale": None}, r"scale: expected a positive number, but got None"),
        ("matchingnet", {"processing_steps": 3}, r"processing_steps: has no effect without full_context=True"),
        (
            "matchingnet",
            {"full_context": True, "processing_steps": 0},
            r"processing_steps: expected a whole number of at least 1",
        ),
        ("matchingnet", {"full_context": 1}, r"full_context: expected True or False, but got 1"),
        ("matchingnet", {"learn_scale": "yes"}, r"learn_scale: expected True or False, but got 'yes'"),
        ("matchingnet", {"scale": 0.0}, r"scale: expected a positive number"),
        ("relationnet", {"hidden": 0}, r"hidden: expected a whole number"),
        ("relationnet", {"hidden": 8, "relation": nn.Linear(12, 1)}, r"hidden: has no effect"),
        ("relationnet", {"relation": torch.sigmoid}, r"relation: expected a torch.nn.Module"),
        (
            "relationnet",
            {"relation": nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))},
            r"'1' is a BatchNorm1d.*GroupNorm\(1, 3\)",
        ),
        (
            "relationnet",
            {"relation": nn.Sequential(nn.Flatten(), nn.LazyLinear(1), nn.Sigmoid())},
            r"ends in a sigmoid",
        ),
        ("mann", {"ways": 1}, r"ways: expected a whole number of at least 2, but got 1"),
        ("mann", {"hidden": 0}, r"hidden: expected a whole number"),
        ("mann", {"slots": 3}, r"slots: expected at least one for each of 4 reads, but got 3"),
        ("mann", {"decay": 1.5}, r"decay: expected a number of at least 0 and at most 1, but got 1.5"),
        ("mann", {"key_strength": 0}, r"key_strength: expected a positive number"),
        ("mann", {"order": "random"}, r"order: expected 'sorted', 'given' or 'shuffled'"),
        ("mann", {"support_loss": 1}, r"support_loss: expected True or False"),
        ("metanet", {"representation": 0}, r"representation: expected a whole number"),
        ("metanet", {"representation_steps": 0}, r"representation_steps: expected a whole number"),
        ("metanet", {"hidden": 0}, r"hidden: expected a whole number"),
        ("metanet", {"ways": 0}, r"ways: expected a whole number"),
        ("memorymodule", {"slots": 0}, r"slots: expected a whole number of at least 1, but got 0"),
        ("memorymodule", {"neighbours": 2.0}, r"neighbours: expected a whole number"),
        ("memorymodule", {"margin": -0.1}, r"margin: expected a number of at least 0, but got -0.1"),
        ("memorymodule", {"inverse_temperature": 0}, r"inverse_temperature: expected a positive number"),
        ("memorymodule", {"age_noise": float("nan")}, r"age_noise: expected a number"),
        ("memorymodule", {"task_loss": True}, r"task_loss: expected a number"),
        ("memorymodule", {"key_gradients": 1}, r"key_gradients: expected True or False"),
        (
            "memorymodule",
            {"task_loss": 0, "loss_fn": nn.CrossEntropyLoss()},
            r"loss_fn: has no effect with task_loss=0",
        ),
        ("statistician", {"context": 0}, r"context: expected a whole number"),
        ("statistician", {"latent": 1.5}, r"latent: expected a whole number"),
        ("statistician", {"hidden": True}, r"hidden: expected a whole number"),
        ("statistician", {"likelihood": "poisson"}, r"likelihood: expected 'auto'"),
        ("statistician", {"discriminative": -1}, r"discriminative: expected a number"),
        ("statistician", {"loss_fn": F.cross_entropy}, r"loss_fn: has no effect on NeuralStatistician"),
    ],
)
def test_a_wrong_argument_is_named_and_the_model_is_untouched(name: str, options: dict[str, Any], words: str) -> None:
    model = seeded(NormedMlp)
    before = fingerprint(model)
    with pytest.raises(ArgumentError, match=words):
        getattr(methods, METHODS[name])(model, **keywords(name, **options))
    assert fingerprint(model) == before


@pytest.mark.parametrize(
    "module", ["heads.class_rows", "heads.class_table", "heads.centre", *(f"methods.{n}" for n in EXAMPLES)]
)
def test_its_example_runs(module: str) -> None:
    with quiet():
        found = doctest.testmod(importlib.import_module(f"metawrap.{module}"))
    assert found.attempted > 0
    assert found.failed == 0
