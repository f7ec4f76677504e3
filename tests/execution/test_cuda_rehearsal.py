"""A run on CUDA without a GPU: no tensor is left on another device, and a steady meta-step never waits for the device.

Every method, every engine under every norm policy, and options that run other code; see `rehearsal.py` of
tests/support. A place where a meta-step has to wait is named in WAITS, with the reason.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from contract import OPTIONS as OWN_OPTIONS
from contract import VARIANTS, batch_of, make, network, quiet
from models import Conv4, NormedMlp, seeded
from rehearsal import CUDA, CudaRehearsal, cuda_rehearsal
from torch import Tensor, nn

from metawrap import TaskError
from metawrap.training.run_settings import METHODS

pytestmark = pytest.mark.filterwarnings("ignore:Accessing the data pointer of FakeTensor")

ENGINES = ("functional", "higher", "batched")
NORMS = ("batch", "support", "running", "task", "task_layer")
# Variants of a method that run tensors of their own.
CASES = [*METHODS, "metaoptnet-ridge", "matchingnet-context", "relationnet-maps", "multi-task-ids"]
CASES += ["fine-tune-full", "fine-tune-growing", "fine-tune-own-labels"]

_READ = "_local_scalar_dense at {}"
_WAYS = {
    _READ.format("learner/embedding_learner.py"): "the labels, copied once for each task, tell the number of classes"
}
_SVM = "the quadratic program is solved on the CPU"
_NEWTON = "the regression is solved in double precision on the CPU"
_UNLABELLED = "targets without a label are left out, so that the number of rows is that of the labels"
_MEMORY = "the slot that an example is written to is that of the nearest key"
_ROWS = "the numbers of a task's classes, a tuple, go to the device"
_LABELS = {_READ.format("heads/class_table.py"): "a label that names no class is refused before it is looked up"}
_SPREAD = "index_put at execution/executor.py"  # The gradient of an index.
# By method: where a steady meta_step waits for the device, and why it must.
WAITS: dict[str, dict[str, str]] = {
    **dict.fromkeys(
        ("r2d2", "protonet", "simpleshot", "matchingnet", "relationnet", "siamese", "mann", "metanet"), _WAYS
    ),
    "metaoptnet": _WAYS | {"_to_copy at heads/multiclass_svm.py": _SVM, "_to_copy at execution/executor.py": _SVM},
    "metaoptnet-ridge": _WAYS,
    "logistic": _WAYS
    | {"_to_copy at heads/softmax_regression.py": _NEWTON, "_to_copy at execution/executor.py": _NEWTON},
    "memorymodule": _WAYS
    | {_READ.format("methods/memory_module.py"): _MEMORY, "index at methods/memory_module.py": _UNLABELLED}
    | {_SPREAD: _UNLABELLED},
    "statistician": _WAYS | {"index at methods/neural_statistician.py": _UNLABELLED, _SPREAD: _UNLABELLED},
    "fine-tune": _LABELS | {"_to_copy at methods/fine_tune.py": _ROWS},
    "fine-tune-own-labels": {},
    "multi-task": _LABELS | {"_to_copy at methods/multi_task.py": _ROWS},
    "multi-task-ids": {},
}
# Options that run other code, with the same.
OPTIONS: list[tuple[dict[str, Any], dict[str, str]]] = [
    ({"memory": "flat"}, {}),
    ({"inner_optimizer": "adam"}, {}),
    ({"max_grad_norm": 1.0, "max_grad_value": 1.0}, {}),
    ({"head_init": "shared"}, {}),
    (
        {"optimizer": lambda parameters: torch.optim.SGD(parameters, lr=0.1)},
        {_READ.format("outer_update/outer_update.py"): "only a fused optimizer leaves a step out on the device"},
    ),
    (
        {"head_init": "prototypes"},
        {_READ.format("inner_loop/class_starts.py"): "a class without a prototype is refused"},
    ),
    (
        {"mask_unused_outputs": True},
        {
            "_unique2 at inner_loop/masking.py": "the used outputs are those that labels name",
            "index at inner_loop/masking.py": "ignored labels name none",
            _READ.format("inner_loop/masking.py"): "a loss that asks for a masked output is refused",
        },
    ),
]


@pytest.fixture
def cuda() -> Iterator[CudaRehearsal]:
    with quiet(), cuda_rehearsal() as mode:
        yield mode


def waits_of_a_steady_step(cuda: CudaRehearsal, learner: Any, batch: Any) -> set[str]:
    """The first inspects."""
    for _ in range(2):
        cuda.waits.clear()
        metrics = learner.meta_step(batch)
    found = set(cuda.waits)
    assert not metrics.skipped
    return found


def assert_all_on_cuda(module: nn.Module) -> None:
    elsewhere = {n: t.device for n, t in (*module.named_parameters(), *module.named_buffers()) if t.device != CUDA}
    assert not elsewhere


def assert_runs_on_cuda(learner: Any, batch: Any) -> None:
    output = learner(batch)
    output.loss.backward()
    assert output.loss.device == CUDA
    learner.eval()
    assert learner(batch).loss.device == CUDA
    assert learner.evaluate(batch).loss > 0
    adapted = learner.adapt(batch[0].support_x, batch[0].support_y)
    assert adapted(batch[0].target_x).device == CUDA
    for module in (learner, adapted, learner.unwrap()):
        assert_all_on_cuda(module)


def rehearsed(case: str, model: nn.Module | None = None, **options: Any) -> tuple[Any, list[Any]]:
    learner = make(case, (model or network(case)).to(CUDA), **options)
    return learner, [task.to(CUDA) for task in batch_of(case, 2, shots=1)]


@pytest.mark.sampled(2)
@pytest.mark.parametrize("case", CASES)
def test_a_steady_meta_step_waits_only_where_it_must(cuda: CudaRehearsal, case: str) -> None:
    # One inner step, where there are inner steps: the options below, and convolutions, take two.
    learner, batch = rehearsed(case, **{"inner_steps": 1} if "inner_steps" in OWN_OPTIONS.get(case, {}) else {})
    expected = WAITS.get(case, WAITS.get(VARIANTS.get(case, (case,))[0], {}))
    assert waits_of_a_steady_step(cuda, learner, batch) == set(expected)
    assert_runs_on_cuda(learner, batch)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("engine", "norm"),
    [("higher", "batch"), *((engine, norm) for engine in ("functional", "batched") for norm in NORMS)],
)
def test_no_engine_waits_under_any_norm_policy(cuda: CudaRehearsal, engine: str, norm: str) -> None:
    learner, batch = rehearsed("maml++", engine=engine, norm=norm, inner_steps=1)
    assert not waits_of_a_steady_step(cuda, learner, batch)
    assert_runs_on_cuda(learner, batch)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("engine", ENGINES)
def test_no_engine_waits_in_convolutions(cuda: CudaRehearsal, engine: str) -> None:
    learner = make("maml++", seeded(lambda: Conv4(filters=2, size=4, blocks=1)).to(CUDA), engine=engine)
    batch = [task.to(CUDA) for task in batch_of("siamese-images", 2, shots=1)]
    batch = [task.map(lambda t: t[:, :, :4, :4] if t.ndim == 4 else t) for task in batch]
    assert not waits_of_a_steady_step(cuda, learner, batch)
    assert_runs_on_cuda(learner, batch)


def test_tasks_of_unequal_sizes_at_once_do_not_wait(cuda: CudaRehearsal) -> None:
    learner, [first, _] = rehearsed("maml++", engine="batched", norm="support", inner_steps=1)
    batch = [first, batch_of("maml++", 1, shots=2, seed=1)[0].to(CUDA)]
    assert not waits_of_a_steady_step(cuda, learner, batch)
    assert "padded" in str(learner.describe())


@pytest.mark.sampled(2)
@pytest.mark.parametrize("place", range(len(OPTIONS)))
def test_an_option_waits_only_where_it_must(cuda: CudaRehearsal, place: int) -> None:
    options, expected = OPTIONS[place]
    learner, batch = rehearsed("maml", **options)
    assert waits_of_a_steady_step(cuda, learner, batch) == set(expected)
    assert_runs_on_cuda(learner, batch)


def test_the_rehearsal_computes_what_the_cpu_computes() -> None:
    with quiet():
        plain = make("maml++")
        losses = [plain.meta_step(batch_of("maml++", 2, shots=1)).loss for _ in range(2)]
    with quiet(), cuda_rehearsal():
        learner, batch = rehearsed("maml++")
        assert [learner.meta_step(batch).loss for _ in range(2)] == pytest.approx(losses, rel=1e-9)
        found = [parameter.detach().cpu() for parameter in learner.parameters()]
    for one, other in zip(found, plain.parameters(), strict=True):
        torch.testing.assert_close(one, other.detach(), rtol=1e-9, atol=1e-12)


def _reads(prediction: Tensor, y: Tensor) -> Tensor:
    loss = F.cross_entropy(prediction, y)
    return loss if loss.item() < 1e9 else loss * 0


def _branches(prediction: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(prediction, y) * (2 if prediction.sum() > 0 else 1)


def _copies(prediction: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(prediction.cpu(), y.cpu()).to(prediction.device)


def _brings(prediction: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(prediction, y, torch.tensor([1.0, 1.0, 1.0], dtype=prediction.dtype).to(prediction.device))


def _selects(prediction: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(prediction[y >= 0], y)


@pytest.mark.sampled(2)
@pytest.mark.parametrize(
    ("loss_fn", "operation"),
    [
        (_reads, "_local_scalar_dense"),
        (_branches, "_local_scalar_dense"),
        (_copies, "_to_copy"),
        (_brings, "_to_copy"),
        (_selects, "index"),
    ],
)
def test_a_loss_that_waits_is_caught(cuda: CudaRehearsal, loss_fn: Any, operation: str) -> None:
    learner, batch = rehearsed("maml", loss_fn=loss_fn)
    assert any(wait.startswith(f"{operation} at") for wait in waits_of_a_steady_step(cuda, learner, batch))


class _OnTheCpu(NormedMlp):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.zeros(3, dtype=x.dtype)


def test_a_tensor_of_the_cpu_in_a_model_is_caught(cuda: CudaRehearsal) -> None:
    learner, batch = rehearsed("maml", seeded(_OnTheCpu))
    with pytest.raises(TaskError, match="Expected all tensors to be on the same device"):
        learner.meta_step(batch)
