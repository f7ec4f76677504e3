"""Tasks in forked processes: what comes back, what is seen, and what is left of them. Gradients: test_workers.py."""

from __future__ import annotations

import contextvars
import os
import signal
import sys
import time
import warnings
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from face import assert_same_values, build
from models import NormedMlp, class_tasks, seeded
from torch import Tensor, nn

from metawrap import MetaWrapWarning
from metawrap.execution.forked_processes import ChildError, LeftBehindError, in_processes
from metawrap.snapshot.reachable_state import _Reader, state_of

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="processes are forked on Linux alone")


def nothing() -> None:
    return None


def test_results_come_in_order_whatever_each_takes_and_no_process_is_left() -> None:
    def work(item: int) -> tuple[int, int, int]:
        time.sleep(0.01 * (item % 3 == 0))
        return item, os.getpid(), torch.get_num_threads()

    found = list(in_processes(work, range(9), 3, nothing))
    assert [item for item, _, _ in found] == list(range(9))
    pids = {pid for _, pid, _ in found}
    assert len(pids) == 3
    assert os.getpid() not in pids
    assert {threads for _, _, threads in found} == {1}
    for pid in pids:
        with pytest.raises(ChildProcessError):  # It has been waited for.
            os.waitpid(pid, os.WNOHANG)


TENSORS = {
    "float32": torch.rand(3, 4),
    "bfloat16": torch.rand(5).bfloat16(),
    "bool": torch.tensor([True, False]),
    "complex": torch.rand(2, 2, dtype=torch.complex128),
    "conjugated": torch.rand(3, dtype=torch.complex64).conj(),
    "scalar": torch.tensor(2.5, dtype=torch.float64),
    "empty": torch.empty(0, 3),
    "transposed": torch.rand(3, 4).t(),
    "channels_last": torch.rand(2, 3, 4, 4).contiguous(memory_format=torch.channels_last),
    "sparse": torch.eye(4).to_sparse(),
    "large": torch.rand(1 << 20),
}


@pytest.mark.parametrize("name", TENSORS)
def test_tensors_come_back_as_they_were(name: str) -> None:
    tensor = TENSORS[name]
    [(found, none, again)] = in_processes(lambda _: (tensor, None, [tensor]), [0], 1, nothing)
    assert none is None
    for each in (found, again[0]):
        assert (each.dtype, each.shape, each.layout) == (tensor.dtype, tensor.shape, tensor.layout)
        assert torch.equal(each.to_dense(), tensor.to_dense())


def test_many_large_results_do_not_lock_up() -> None:
    found = list(in_processes(lambda item: torch.full((1 << 18,), float(item)), range(12), 3, nothing))
    assert [float(each[0]) for each in found] == [float(i) for i in range(12)]


def test_a_process_that_fails_or_dies_is_named_with_its_item() -> None:
    def fails(item: int) -> int:
        if item == 3:
            raise ValueError("no three")
        return item

    def dies(item: int) -> int:
        if item == 2:
            os.kill(os.getpid(), signal.SIGKILL)
        return item

    with pytest.raises(ChildError, match="ValueError: no three") as failed:
        list(in_processes(fails, range(6), 2, nothing))
    assert failed.value.index == 3
    with pytest.raises(ChildError, match="died") as dead:
        list(in_processes(dies, range(6), 2, nothing))
    assert dead.value.index == 2
    with pytest.raises(LeftBehindError, match="a trace"):
        list(in_processes(lambda item: item, range(2), 2, lambda: "a trace"))


@pytest.mark.parametrize("slow", ["own", "forked"])
def test_this_process_can_do_the_work_of_one(slow: str) -> None:
    home, threads = os.getpid(), torch.get_num_threads()

    def work(item: int) -> tuple[Tensor, int, int]:
        time.sleep(0.05 * ((os.getpid() == home) == (slow == "own")))
        return torch.full((1 << 16,), float(item)), os.getpid(), torch.get_num_threads()

    found = list(in_processes(work, range(7), 2, nothing, work))
    assert [float(values[-1]) for values, _, _ in found] == [float(item) for item in range(7)]
    assert [pid == home for _, pid, _ in found] == [True, False] * 3 + [True]
    assert {used for _, _, used in found} == {1}
    assert torch.get_num_threads() == threads


def test_a_failure_of_the_own_work_is_named_with_its_item_and_no_process_is_left() -> None:
    def own(item: int) -> int:
        if item == 8:
            raise ValueError("no eight")
        return 0

    found: list[int] = []
    with pytest.raises(ChildError, match="ValueError: no eight") as failed:
        found.extend(in_processes(lambda item: os.getpid(), range(40), 2, nothing, own))
    assert failed.value.index == 8
    with pytest.raises(ChildProcessError):
        os.waitpid(max(found), os.WNOHANG)


def refuse() -> None:
    raise ValueError("not to be read")


class Unreadable:
    def __reduce__(self) -> Any:
        return refuse, ()


@pytest.mark.timeout(60)
def test_a_result_that_cannot_be_read_is_an_error_and_nothing_to_do_is_no_work() -> None:
    with pytest.raises(ValueError, match="not to be read"):
        list(in_processes(lambda item: Unreadable(), range(4), 2, nothing))
    assert list(in_processes(lambda item: item, [], 2, nothing, lambda item: item)) == []


@pytest.mark.timeout(60)
def test_a_process_that_the_work_began_and_left_keeps_nobody_waiting() -> None:
    def work(item: int) -> int:
        if pid := os.fork():
            return pid
        time.sleep(300)
        os._exit(0)

    for pid in list(in_processes(work, range(2), 2, nothing)):
        os.kill(pid, signal.SIGKILL)  # It fails where the process has ended, so it would have been waited for.


def closure() -> Any:
    held = [0]
    return lambda x: x * (1 + held[0])


class Calling(nn.Module):
    def __init__(self, function: Any) -> None:
        super().__init__()
        self.function = function


@pytest.mark.parametrize(
    ("parts", "outside"),
    [
        ([NormedMlp(), F.cross_entropy], False),
        ([NormedMlp(), nn.CrossEntropyLoss(label_smoothing=0.1)], False),
        ([NormedMlp(), partial(F.cross_entropy, label_smoothing=0.1)], False),
        ([NormedMlp(), closure()], True),
        ([NormedMlp(), partial(closure())], True),
        ([NormedMlp(), lambda prediction, y, seen=[]: F.cross_entropy(prediction, y)], True),
        ([Calling(closure()), F.cross_entropy], True),
        ([Calling(partial(closure())), F.cross_entropy], True),
        ([Calling(torch.tanh), F.cross_entropy], False),
        ([NormedMlp(), lambda prediction, y: prediction.mean() * len(TENSORS)], True),
        ([Calling(contextvars.ContextVar("seen")), F.cross_entropy], True),
    ],
    ids=range(11),
)
def test_state_outside_of_the_parts_is_known(parts: list[Any], outside: bool) -> None:
    assert state_of(parts).outside is outside


def test_a_list_made_for_reading_is_not_taken_for_an_earlier_one_that_was_freed() -> None:
    reader = _Reader()
    read = [reader.read([number]) for number in (1, 2)]
    assert read == [(1,), (2,)]


class Counting(NormedMlp):
    """Counts its calls in its class, where copies of it share the number, from the time it is told to."""

    calls, counts = 0, False

    def forward(self, x: Tensor) -> Tensor:
        cls: Any = type(self)
        if cls.counts:
            cls.calls += 1
        return super().forward(x) * (1 + 0.1 * cls.calls)


def test_a_step_that_turns_out_to_depend_on_order_is_done_as_if_no_process_had_tried_it() -> None:
    ways: list[dict[str, Any]] = [{}, {"workers": 2, "workers_in": "processes"}]
    # A class each, as the number is its class's.
    classes: list[Any] = [type(name, (Counting,), {}) for name in ("Plain", "Asked")]
    plain, asked = (build(seeded(made), engine="functional", **way) for made, way in zip(classes, ways, strict=True))
    batch = class_tasks((4,), tasks=4)
    for step in range(4):
        for made in classes:
            made.counts = step > 1
        plain.meta_step(batch)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", MetaWrapWarning)
            asked.meta_step(batch)
    assert classes[0].calls == classes[1].calls > 0
    assert_same_values([*asked.parameters(), *asked.buffers()], [*plain.parameters(), *plain.buffers()])


def test_what_is_printed_there_is_printed_once(capfd: pytest.CaptureFixture[str]) -> None:
    print("before", end=" ")
    list(in_processes(lambda item: print(f"item {item}"), range(2), 1, nothing))
    print("after")
    assert capfd.readouterr().out == "before item 0\nitem 1\nafter\n"


class Telling(nn.Module):
    """Writes down who runs it, and scales by an attribute that the user may set."""

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.inside, self.path, self.scale = NormedMlp(), str(path), 1.0

    def forward(self, x: Tensor) -> Tensor:
        with open(self.path, "a") as file:
            file.write(f"{os.getpid()}\n")
        return self.inside(x) * self.scale


def told(path: Path) -> set[int]:
    pids = {int(line) for line in path.read_text().split()}
    path.write_text("")
    return pids


def test_each_step_is_solved_by_two_processes_that_see_the_model_as_it_is_now(tmp_path: Path) -> None:
    plain = build(seeded(lambda: Telling(tmp_path / "plain")), engine="functional")
    asked = build(seeded(lambda: Telling(tmp_path / "asked")), workers=2, workers_in="processes", engine="functional")
    batch = class_tasks((4,), tasks=4)
    for scale in (1.0, 2.0, 0.5):
        plain.model.scale = asked.model.scale = scale
        plain.meta_step(batch)
        asked.meta_step(batch)
        seen = told(tmp_path / "asked")
    assert len(seen) == 2
    assert os.getpid() in seen  # It does the work of one of them.
    assert_same_values([*asked.parameters(), *asked.buffers()], [*plain.parameters(), *plain.buffers()])
    assert "2 processes" in str(asked.describe())


def test_a_model_that_threads_cannot_run_is_solved_by_forked_processes_alone(tmp_path: Path) -> None:
    def made() -> Telling:
        model = Telling(tmp_path / "asked")
        torch.nn.utils.parametrizations.weight_norm(model.inside.linear)
        return model

    learner = build(seeded(made), workers=2, workers_in="processes", engine="functional")
    for _ in range(2):
        learner.meta_step(class_tasks((4,), tasks=4))
        seen = told(tmp_path / "asked")
    assert len(seen) == 2
    assert os.getpid() not in seen


class Mortal(NormedMlp):
    """Dies in every process but the one that it was made in, from the time it is told to."""

    def __init__(self) -> None:
        super().__init__()
        self.home, self.deadly = os.getpid(), False

    def forward(self, x: Tensor) -> Tensor:
        if self.deadly and os.getpid() != self.home:
            os.kill(os.getpid(), signal.SIGKILL)
        return super().forward(x)


@pytest.mark.parametrize("from_the_start", [True, False])
def test_a_step_whose_processes_die_is_done_in_order(from_the_start: bool) -> None:
    ways: list[dict[str, Any]] = [{}, {"workers": 2, "workers_in": "processes"}]
    plain, asked = (build(seeded(Mortal), engine="functional", **way) for way in ways)
    batch = class_tasks((4,), tasks=4)
    if not from_the_start:
        plain.meta_step(batch)
        asked.meta_step(batch)
    asked.model.deadly = True
    with pytest.warns(MetaWrapWarning, match=r"one after another, because .*died"):
        asked.meta_step(batch)
    plain.meta_step(batch)
    asked.meta_step(batch)
    plain.meta_step(batch)
    assert_same_values([*asked.parameters(), *asked.buffers()], [*plain.parameters(), *plain.buffers()])


def test_where_cuda_was_used_tasks_are_solved_in_order(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    learner = build(seeded(NormedMlp), workers=2, workers_in="processes", engine="functional")
    with pytest.warns(MetaWrapWarning, match="CUDA was used in this process"):
        learner.meta_step(class_tasks((4,)))
