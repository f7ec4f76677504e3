"""Networks that return dicts, dataclasses and pairs: the prediction is known, or it is asked for by name."""

from __future__ import annotations

import copy
import re
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from many_outputs import KNOWN, UNKNOWN, Many, ModelOutput, Outputs, logits_of
from models import class_tasks, seeded
from torch import Tensor, nn

import metawrap
from metawrap import ANIL, MAML, ArgumentError, FineTune, ProtoNet, Task, UnsupportedModuleError, ZeroStep
from metawrap.tasks import map_tensors

TASKS = [
    Task(*each, classes=classes)
    for each, classes in zip(zip(*class_tasks((4,), shots=2), strict=True), [(0, 1, 2), (3, 1, 4)], strict=True)
]
SHORT: dict[str, Any] = {"inner_steps": 2, "inner_lr": 0.1}
QUICK = SHORT | {"engine": "functional"}
METHODS: dict[str, dict[str, Any]] = {
    **{"MAML": QUICK, "Reptile": QUICK, "ANIL": SHORT, "FineTune": SHORT | {"classes": 5}, "MultiTask": SHORT},
    **{"ProtoNet": {}, "R2D2": {}, "MANN": {"hidden": 8, "slots": 8}, "MetaNet": {}, "RelationNet": {}},
    **{"MemoryModule": {}, "ZeroStep": {}},
}
HEADED = sorted(METHODS.keys() - {"MAML", "Reptile", "ZeroStep"})
pytestmark = pytest.mark.filterwarnings("ignore:The support loss does not depend on:metawrap.MetaWrapWarning")


def network(form: Any) -> Any:
    return seeded(lambda: Many(form))


def own_loss(output: Any, y: Tensor) -> Tensor:
    assert not isinstance(output, dict) or output.get("sharp", True)  # A flag beside the prediction stays.
    return F.cross_entropy(logits_of(output), y)


def figures(method: str, form: Any, **options: Any) -> list[Tensor]:
    """The loss, the meta-gradient, an evaluation and the adapted module's prediction."""
    torch.manual_seed(0)
    learner = getattr(metawrap, method)(network(form), **METHODS[method] | options)
    metrics = learner.meta_step(TASKS)
    gradients = [p.grad for name, p in learner.named_parameters() if "aux" not in name and p.grad is not None]
    result = learner.evaluate(TASKS, keep_predictions=True)
    adapted = learner.adapt(TASKS[0].support_x, TASKS[0].support_y)(TASKS[0].target_x)
    shown = [logits_of(each) for each in (adapted, *result.predictions)]
    torch.testing.assert_close(shown[0], shown[1])
    assert type(adapted) is type(result.predictions[0])
    return [torch.tensor(metrics.loss), torch.tensor(result.loss), *gradients, *shown]


@pytest.mark.sampled(5)
@pytest.mark.parametrize("loss", [{}, {"loss_fn": own_loss}], ids=["default", "own"])
@pytest.mark.parametrize("method", METHODS)
def test_a_known_prediction_trains_as_the_bare_tensor_does(method: str, loss: dict[str, Any]) -> None:
    expected = figures(method, KNOWN["tensor"], **loss)
    for name in KNOWN if method in ("ANIL", "ProtoNet") else ("dict with an auxiliary head", "transformers"):
        torch.testing.assert_close(figures(method, KNOWN[name], **loss), expected, rtol=1e-9, atol=1e-12, msg=name)


def test_an_auxiliary_head_that_runs_last_is_not_the_head() -> None:
    net, task = network(KNOWN["dict with an auxiliary head"]), TASKS[0]

    def embedded(x: Tensor) -> np.ndarray:
        value = x.numpy()
        for layer in (net.body, net.deep):
            value = np.tanh(value @ layer.weight.detach().numpy().T + layer.bias.detach().numpy())
        return value

    learner = ProtoNet(net)
    found = learner.evaluate([task], keep_predictions=True)
    support, target, labels = embedded(task.support_x), embedded(task.target_x), task.support_y.numpy()
    means = np.stack([support[labels == label].mean(0) for label in range(3)])
    logits = -((target[:, None] - means[None]) ** 2).sum(-1)
    shown = found.predictions[0]["logits"].numpy()
    np.testing.assert_allclose(
        shown - shown[:, :1], logits - logits[:, :1], rtol=1e-9
    )  # But for a constant of the row.
    assert found.accuracy == pytest.approx(np.mean(logits.argmax(1) == task.target_y.numpy()))
    assert learner.head == "head"


@pytest.mark.sampled(8)
@pytest.mark.parametrize("output", UNKNOWN)
@pytest.mark.parametrize("method", HEADED)
def test_an_ambiguous_prediction_is_refused_and_the_fix_works(method: str, output: str) -> None:
    form, path = UNKNOWN[output]
    named = rf"{re.escape(path)} \(6, 3\) of 'head'.*Name the head with head="
    with pytest.raises(UnsupportedModuleError, match=named):
        figures(method, form)
    losses = []
    for own, head in ((form, "head"), (KNOWN["tensor"], None)):
        torch.manual_seed(0)
        learner = getattr(metawrap, method)(network(own), head=head, **METHODS[method])
        metrics, result = learner.meta_step(TASKS), learner.evaluate(TASKS)
        losses.append((metrics.loss, metrics.accuracy, result.loss, result.accuracy))
    assert losses[0] == pytest.approx(losses[1], rel=1e-9)


@pytest.mark.parametrize("output", UNKNOWN)
@pytest.mark.parametrize("method", [MAML, ZeroStep])
def test_a_loss_of_tensors_refuses_an_ambiguous_output_and_its_own_advice_works(method: Any, output: str) -> None:
    form, path = UNKNOWN[output]
    with pytest.raises(ArgumentError, match=r"^loss_fn: the network returns") as refused:
        method(network(form)).meta_step(TASKS)
    advice = re.search(r"lambda output, y: .*?\(.*?, y\)", str(refused.value))
    assert advice is not None
    first = next(iter(re.findall(r"output\S*", advice[0].split(":", 1)[1]))).rstrip(",")
    learner = method(network(form), loss_fn=eval(advice[0].replace(first, path), {"torch": torch}))
    assert learner.meta_step(TASKS).loss == pytest.approx(method(network(KNOWN["tensor"])).meta_step(TASKS).loss)


@pytest.mark.parametrize(
    "more",
    [
        lambda output: output["features"].square().mean(),
        lambda output: 0.1 * output["features"].sum(),
        lambda output: F.mse_loss(output["features"], torch.zeros(1)),
        lambda output: output["scale"] * output["logits"].sum(),
    ],
)
@pytest.mark.parametrize("method", ["ANIL", "ProtoNet", "MultiTask"])
def test_a_loss_that_reads_what_a_fitted_head_has_not_made_is_refused(method: str, more: Any) -> None:
    with pytest.raises(ArgumentError, match=r"loss_fn: reads more of the network's output than the prediction"):
        figures(method, KNOWN["dict with features"], loss_fn=lambda output, y: own_loss(output, y) + more(output))


@pytest.mark.parametrize("tune", ["head", "full"])
def test_training_by_shared_labels_takes_the_prediction_of_the_named_head(tune: Any) -> None:
    options: Any = SHORT | {"tune": tune, "classes": "shared", "head": "head"}
    task, first = replace(TASKS[0], classes=None), lambda output, y: F.cross_entropy(output[0], y)
    pair = FineTune(network(UNKNOWN["two heads"][0]), loss_fn=first, **options)
    assert pair.meta_step([task]).loss == FineTune(network(KNOWN["tensor"]), **options).meta_step([task]).loss


@pytest.mark.parametrize("method", ["MAML", "ANIL", "R2D2", "ZeroStep"])
@pytest.mark.parametrize(
    ("loss", "words"),
    [
        (lambda output, y: -output.log_softmax(1)[range(len(y)), y].mean(), "AttributeError"),
        (lambda output, y: F.cross_entropy(output["scores"], y), "KeyError: 'scores'"),
        (lambda output, y: F.cross_entropy(output, y), "TypeError"),
    ],
)
def test_a_loss_that_cannot_read_the_output_is_told_what_it_gets(method: str, loss: Any, words: str) -> None:
    with pytest.raises(ArgumentError, match=rf"loss_fn: it gets .*a dict with output\['logits'\].*{words}"):
        figures(method, KNOWN["dict"], loss_fn=loss)


class Scores(nn.Linear):
    """A head that makes the whole output."""

    def forward(self, x: Tensor) -> Any:
        return {"logits": super().forward(x)}


@pytest.mark.parametrize("loss", [{}, {"loss_fn": own_loss}], ids=["default", "own"])
@pytest.mark.parametrize("method", ["ANIL", "FineTune", "MultiTask", "MultiTask by id"])
def test_a_head_may_make_the_whole_output(method: str, loss: dict[str, Any]) -> None:
    method, *by_id = method.split(" by ")
    tasks = [replace(task, id="a", classes=None) for task in TASKS] if by_id else TASKS
    net = network(KNOWN["tensor"])
    own = copy.deepcopy(net)
    own.head = Scores(5, 3).double()
    own.head.load_state_dict(net.head.state_dict())
    results = []
    for model in (net, own):
        learner = getattr(metawrap, method)(model, head="head", **METHODS[method], **loss)
        results.append((learner.meta_step(tasks).loss, learner.evaluate(tasks).loss, learner.evaluate(tasks).accuracy))
    assert results[0] == results[1]
    with pytest.raises(UnsupportedModuleError, match="'head' that does not return the prediction as a tensor"):
        ProtoNet(own).meta_step(tasks)


class Unheaded(Many):
    """Returns two things that could be the embedding; takes its input by name."""

    def forward(self, *, x: Tensor) -> Any:
        return super().forward(x)


def test_which_tensor_is_the_embedding_is_asked_for() -> None:
    net = seeded(lambda: Unheaded(lambda net, shallow, deep: {"logits": shallow, "pooled": deep}))
    task = Task({"x": TASKS[0].support_x}, TASKS[0].support_y, {"x": TASKS[0].target_x}, TASKS[0].target_y)
    with pytest.raises(UnsupportedModuleError, match=r"which one is the embedding.*lambda output: output\['pooled'\]"):
        ProtoNet(net, embedding="output").meta_step([task])
    learner = ProtoNet(net, embedding=lambda output: output["pooled"])
    expected = ProtoNet(network(KNOWN["tensor"])).evaluate(TASKS[:1], keep_predictions=True).predictions[0]
    torch.testing.assert_close(learner.evaluate([task], keep_predictions=True).predictions[0], expected)
    torch.testing.assert_close(learner.adapt(task.support_x, task.support_y)(**task.target_x), expected)
    for wrong in ("pooled", nn.Linear(5, 5), 3):
        with pytest.raises(ArgumentError, match="embedding: expected 'head_input' or 'output', or a function"):
            ProtoNet(net, embedding=wrong)  # type: ignore[arg-type]


def test_an_auxiliary_head_in_training_alone_is_named_and_then_no_obstacle() -> None:
    def form(net: Any, shallow: Tensor, deep: Tensor) -> Any:
        return (net.head(deep), net.aux(shallow)) if net.training else net.head(deep)

    with pytest.raises(UnsupportedModuleError, match=r"output\[0\] \(6, 3\) of 'head', output\[1\] \(6, 3\) of 'aux'"):
        ANIL(network(form)).meta_step(TASKS)
    found, plain = ANIL(network(form), head="head"), ANIL(network(KNOWN["tensor"]))
    assert found.meta_step(TASKS).loss == plain.meta_step(TASKS).loss
    assert found.evaluate(TASKS).loss == plain.evaluate(TASKS).loss
    assert found.head == "head"


@pytest.mark.parametrize("form", ["dict", "dict with an auxiliary head", "transformers", "object", "mapping"])
def test_outputs_of_absent_classes_are_masked_in_any_form(form: str) -> None:
    task = Task(*(part[:4] for part in TASKS[0].parts()))  # Classes 0 and 1 of three outputs.
    results = []
    for output in (KNOWN["tensor"], KNOWN[form]):
        learner = MAML(network(output), outputs={"mask_unused_outputs": True}, **QUICK)
        results.append(learner.evaluate([task], keep_predictions=True))
    assert results[0].loss == results[1].loss
    torch.testing.assert_close(logits_of(results[1].predictions[0]), results[0].predictions[0])
    assert logits_of(results[1].predictions[0])[:, 2].isneginf().all()


@pytest.mark.parametrize(
    ("output", "loss", "words"),
    [
        (
            KNOWN["dict with an auxiliary head"],
            lambda o, y: F.cross_entropy(o["aux"], y),
            "another tensor of its shape",
        ),
        (lambda *parts: MappingProxyType(KNOWN["dict"](*parts)), own_loss, "no other can take its place"),
    ],
)
def test_what_a_mask_does_not_reach_is_refused(output: Any, loss: Any, words: str) -> None:
    learner = MAML(network(output), outputs={"mask_unused_outputs": True}, loss_fn=loss, **QUICK)
    with pytest.raises(metawrap.TaskError, match=words):
        learner.meta_step(TASKS)


def test_the_parts_of_an_output_change_together() -> None:
    tensor = torch.ones(2, requires_grad=True) * 2
    for output in (ModelOutput(logits=tensor, hidden_states=(tensor,)), Outputs(tensor)):
        changed = map_tensors(output, Tensor.detach)
        assert type(changed) is type(output)
        assert not any(part.requires_grad for part in (changed.logits, changed[0]))
    assert changed is not output
    assert copy.copy(output) == output


@pytest.mark.parametrize(
    ("y", "loss"),
    [
        (torch.arange(6) % 3, {}),
        (F.one_hot(torch.arange(6) % 3).double(), {}),
        (F.one_hot(torch.arange(6) % 3).double(), {"loss_fn": nn.CrossEntropyLoss(label_smoothing=0.1)}),
        (torch.arange(6) % 3, {"loss_fn": lambda output, y: F.mse_loss(output.argmax(1) * 1.0, y * 1.0)}),
    ],
)
def test_joint_training_does_not_take_label_0_for_one_class(y: Tensor, loss: dict[str, Any]) -> None:
    task = Task(TASKS[0].support_x, y, TASKS[0].support_x, y)
    learner = FineTune(network(KNOWN["tensor"]), **loss)
    with pytest.raises(metawrap.TaskError, match=r'label 0 of one task need not be label 0 of another.*"shared"'):
        learner.meta_step([task, task])
    with pytest.raises(metawrap.TaskError, match=r"a task names its classes"):
        FineTune(network(KNOWN["tensor"]), classes="shared").meta_step(TASKS)
