"""The benchmarks check what they time, and run from end to end at a tiny size; no time is asserted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

# pyproject.toml has pytest put benchmarks/ on the path, as `python benchmarks` does.
import oracle
import pytest
import torch
from torch import Tensor

from gpu import meta_step
from metawrap.execution.cuda_graphs import RECORDERS
from rivals import cases, contenders
from rivals.cases import Case
from rivals.contenders import SETTINGS, Setting
from rivals.libraries import Skipped, require
from rivals.plain import PlainLoop
from speed import compare, measure, processes

SHARED = {"device": "cpu", "threads": 1, "allocator": "default"}
TINY = Case("A", ways=3, targets=2, tasks=3, steps=2, side=16, filters=3)
PNG = b"\x89PNG"


def agreement_of(name: str, case: Case = TINY) -> dict[str, Any]:
    (record,) = measure.agreement(case, [name], "cpu")
    return record


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measures in this process, because a process takes seconds to start; threads and cores stay as they are."""
    threads = torch.get_num_threads()

    def in_this_process(
        job: str, case: Case, shared: dict[str, Any], ranks: int = 1, **arguments: Any
    ) -> Iterator[dict[str, Any]]:
        assert ranks == 1
        threads = {} if job == "agreement" else {"threads": 1}
        found = list(measure.JOBS[job](case, device="cpu", **threads, **arguments))
        return iter(json.loads(json.dumps(found)))

    monkeypatch.setattr(compare, "in_child", in_this_process)
    for script in (compare, meta_step):
        monkeypatch.setattr(script, "use_threads", lambda *_: None)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    def run(script: Any, *flags: str) -> list[dict[str, Any]]:
        name = "gpu" if script is meta_step else "compare"
        always = ["--small", "--repeats", "2", "--threads", "1", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [name, *always, *flags])
        script.main()
        return [json.loads(line) for line in (tmp_path / f"{name}.jsonl").read_text().splitlines()]

    return run


@pytest.mark.parametrize("one_backward", [False, True])
def test_the_plain_loop_of_the_benchmarks_equals_the_tests_own(one_backward: bool) -> None:
    values = cases.initial_values(TINY, torch.float64, "cpu", spread=0.02)
    tasks = cases.make_tasks(TINY, torch.float64, "cpu")
    loop = PlainLoop(TINY, values, tasks, one_backward=one_backward)
    loop.step()
    rows = torch.zeros(TINY.steps, TINY.filters, dtype=torch.float64)
    statistics = {f"conv{b}.norm.running_mean": rows for b in range(4)}
    statistics |= {f"conv{b}.norm.running_var": rows + 1 for b in range(4)}
    rates = {name.removeprefix("lr/"): value for name, value in values.items() if name.startswith("lr/")}
    learned = {name: value for name, value in values.items() if not name.startswith("lr/")}
    expected = oracle.conv4_meta_gradient(tasks, learned, rates, statistics, [0.5, 0.5])
    oracle.assert_same_gradients(loop.gradients(), expected.gradients)
    for block in range(4):
        torch.testing.assert_close(loop.means[block], expected.statistics[f"conv{block}.norm.running_mean"])
        torch.testing.assert_close(loop.variances[block], expected.statistics[f"conv{block}.norm.running_var"])


PEERS = ["higher", "torchopt", "learn2learn", "iteryne", "parallel-metalearn"]


@pytest.mark.parametrize("name", ["metawrap functional", "metawrap flat", "metawrap first-order", *PEERS])
def test_a_meta_step_has_the_plain_loops_gradient(name: str) -> None:
    for module in SETTINGS[name].needs:
        pytest.importorskip(module)
    record = agreement_of(name)
    assert record["kind"] == "agreement", record
    assert record["relative_error"] < 1e-9


@pytest.mark.parametrize("name", ["iteryne", "parallel-metalearn"])
def test_later_meta_steps_of_a_library_have_the_plain_loops_gradients(name: str) -> None:
    for module in SETTINGS[name].needs:
        pytest.importorskip(module)
    case = replace(TINY, steps=3)  # 1/3 is another number in float32: parallel-metalearn's weights have to cancel.
    library, loop = (SETTINGS[each].build(case, torch.float64, "cpu", 0.02) for each in (name, "plain"))
    for _ in range(3):
        library.step()
        loop.step()
    assert measure.worst_error(library.gradients(), loop.gradients())[0] < 1e-9


@pytest.mark.slow
def test_a_jitted_meta_step_has_the_plain_loops_gradient() -> None:
    pytest.importorskip("jax")
    # 64 filters, as in the cases: with fewer, a pooling with a wrong gradient was not noticed.
    assert agreement_of("jax", Case("wide", tasks=1, steps=1))["relative_error"] < 1e-9


class HalfRight(PlainLoop):
    """Wrong in one small tensor."""

    def gradients(self) -> dict[str, torch.Tensor]:
        found = super().gradients()
        return found | {"conv3.norm.bias": found["conv3.norm.bias"] * (1 + 1e-6)}


class OneShort(PlainLoop):
    """Does not learn a rate."""

    def gradients(self) -> dict[str, torch.Tensor]:
        found = super().gradients()
        del found["lr/linear.bias"]
        return found


class NotANumber(PlainLoop):
    def gradients(self) -> dict[str, torch.Tensor]:
        found = super().gradients()
        return found | {"linear.bias": found["linear.bias"] / 0 * 0}


@pytest.mark.parametrize(
    ("kind", "tensor"), [(HalfRight, "conv3.norm.bias"), (OneShort, "lr/linear.bias"), (NotANumber, "linear.bias")]
)
def test_a_wrong_gradient_is_reported_with_its_tensor(
    kind: type[PlainLoop], tensor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SETTINGS, "wrong", Setting("wrong", "peer", kind))
    record = agreement_of("wrong")
    assert not record["agrees"]
    assert record["worst_tensor"] == tensor


def test_a_setting_that_cannot_run_is_left_out_with_the_reason(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, reason in (({"haste": True}, "no haste="), ({"engine": "steam"}, "'steam'")):
        monkeypatch.setitem(SETTINGS, "new", Setting("new", "metawrap", contenders.Metawrap, options))
        record = agreement_of("new")
        assert record["kind"] == "skipped"
        assert reason in record["reason"]
    monkeypatch.setitem(sys.modules, "torchopt", None)  # As if it were not installed.
    record = agreement_of("torchopt")
    assert (record["kind"], "torchopt" in record["reason"]) == ("skipped", True)
    with pytest.raises(Skipped, match="no_such_package is not installed; the extra 'bench'"):
        require("no_such_package.part")


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_a_comparison_writes_records_and_pictures(
    run: Callable[..., list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    # SETTINGS is one dictionary in all modules, so the comparison uses the stand-in.
    monkeypatch.setitem(SETTINGS, "learn2learn", Setting("learn2learn", "peer", HalfRight))
    chosen = ["--only", "metawrap functional", "learn2learn"]
    records = run(compare, "--cases", "A", "C", "--grow", "steps", "--grow-values", "1", "2", *chosen)
    of_a = [record for record in records if record["case"]["name"] == "A (small)" and "grow" not in record]
    assert {record["setting"] for record in of_a if record["kind"] == "time"} == {"plain", "metawrap functional"}
    times = {record["setting"]: record for record in of_a if record["kind"] == "time"}
    assert times["plain"]["ratio_to_plain"] == 1
    assert len(times["metawrap functional"]["seconds"]) == 2
    assert {record["setting"] for record in of_a if record["kind"] == "memory"} == {"plain", "metawrap functional"}
    assert {record["value"] for record in records if record.get("grow") == "steps"} == {1, 2}
    for record in records:
        assert record["machine"]["torch"] == torch.__version__
        assert record["allocator"] in ("tuned", "default")
    for name in ("compare.png", "growth.png"):
        assert (tmp_path / name).read_bytes().startswith(PNG)
    printed = capsys.readouterr().out
    assert "wrong, not timed: learn2learn" in printed
    assert "metawrap functional" in printed


class Here:
    """Stands in for `measure.Apart`: steps in this process, and keeps the checkout of each contender."""

    checkouts: dict[str, str | None]

    def __init__(self, case: Case, shared: dict[str, Any], name: str, _: int) -> None:
        Here.checkouts[name] = shared["checkout"]
        self.contender = contenders.setting_of(name).build(case, torch.float32, "cpu")
        self.step, self.close = self.contender.step, lambda: None


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_two_versions_are_timed_in_processes_of_their_own_and_compared(
    run: Callable[..., list[dict[str, Any]]], monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(measure, "Apart", Here)
    Here.checkouts = {}
    root = str(Path(__file__).parents[2])
    there = f"metawrap functional at {root}"
    records = run(compare, "--cases", "A", "--only", "metawrap functional", "metawrap flat", "--also", root)
    assert Here.checkouts == {"metawrap functional": None, there: root}
    seconds = {record["setting"]: record["seconds"] for record in records if record["kind"] == "time"}
    assert set(seconds) == {"plain", "metawrap functional", "metawrap flat", there}
    (ratio,) = (record["here_over_there"] for record in records if record["kind"] == "versions")
    pairs = zip(seconds["metawrap functional"], seconds[there], strict=True)
    assert ratio == pytest.approx(sum(here / other for here, other in pairs) / 2)
    assert f"metawrap functional: {ratio:.3f} of its time at" in capsys.readouterr().out


def test_a_folder_without_metawrap_is_refused(
    run: Callable[..., list[dict[str, Any]]], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit):
        run(compare, "--also", str(tmp_path))
    assert "--also: expected the folder of a checkout" in capsys.readouterr().err
    with pytest.raises(SystemExit):
        run(compare, "--only", "metawrap flat", "--also", str(Path(__file__).parents[2]))
    assert 'Add "metawrap default"' in capsys.readouterr().err


@pytest.mark.slow
def test_the_process_of_another_checkout_imports_its_metawrap(tmp_path: Path) -> None:
    (tmp_path / "metawrap").mkdir()
    (tmp_path / "metawrap" / "__init__.py").write_text("raise SystemExit(7)")
    (record,) = processes.in_child("memory", TINY, SHARED | {"checkout": str(tmp_path)}, name="plain")
    assert "status 7" in record["reason"]


@pytest.mark.slow
def test_a_measurement_in_its_own_process_returns_its_records() -> None:
    (record,) = processes.in_child("memory", TINY, SHARED, name="plain")
    assert (record["kind"], record["setting"], record["allocator"]) == ("memory", "plain", "default")
    assert record["peak_mb"] >= 0


@pytest.mark.slow
@pytest.mark.parametrize(("name", "ranks"), [("plain", 1), ("metawrap default", 2)])
def test_a_contender_apart_steps_when_told_and_ends_when_closed(name: str, ranks: int) -> None:
    contender = processes.Apart(replace(TINY, ranks=ranks), SHARED, name, ranks)
    contender.step()
    contender.step()
    contender.close()
    assert [process.returncode for process in contender._processes] == [0] * ranks


@pytest.mark.slow
def test_two_ranks_have_the_plain_loops_gradient() -> None:
    (record,) = processes.in_child("agreement", replace(TINY, ranks=2), SHARED, 2, names=["metawrap default"])
    assert record["agrees"], record
    assert record["relative_error"] > 0


def test_a_process_that_dies_is_a_failure_with_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(processes, "BENCHMARKS", Path(__file__).parent / "no_such_script.py")
    (record,) = processes.in_child("memory", TINY, SHARED, name="plain")
    assert (record["kind"], record["setting"]) == ("failed", "plain")
    assert "status 2" in record["reason"]


@pytest.mark.slow
@pytest.mark.usefixtures("here")
def test_the_gpu_script_runs_on_the_cpu_with_operations_for_kernels(run: Callable[..., list[dict[str, Any]]]) -> None:
    flags = ("--device", "cpu", "--cases", "A", "--precision", "tf32", "bf16", "--only", "metawrap functional")
    records = run(meta_step, *flags, "plain graphs")
    kinds = {record["kind"] for record in records}
    assert kinds == {"bandwidth ceiling", "convolution ceiling", "matmul ceiling", "agreement", "skipped", "cpu"}
    assert {r["setting"]: r["reason"] for r in records if r["kind"] == "skipped"} == {
        "plain graphs": "CUDA graphs are for a GPU"
    }
    found = [r for r in records if r["kind"] == "cpu" and r["setting"] == "metawrap functional"]
    assert [record["precision"] for record in found] == ["tf32", "bf16"]
    for record in found:
        assert "kernels" not in record
        assert record["operations"] > 100
        assert all(record[f"{ceiling}_percent"] > 0 for ceiling in ("convolution", "matmul", "bandwidth"))


def test_the_recorded_plain_loop_has_the_gradients_of_the_plain_loop(monkeypatch: pytest.MonkeyPatch) -> None:
    def record(run: Callable[[], list[Tensor]]) -> Any:
        """Runs again at each replay, into the same memory, as a replay of a graph does."""
        first = run()

        def replay() -> None:
            for mine, new in zip(first, run(), strict=True):
                mine.copy_(new)

        return replay, first

    monkeypatch.setitem(RECORDERS, "cpu", record)
    found = agreement_of("plain graphs")
    assert found["agrees"], found
    assert found["steps"] == 4


def test_flops_of_a_meta_step_are_those_that_a_count_by_hand_gives() -> None:
    case = Case("one", ways=2, tasks=1, steps=1, side=16, channels=1, filters=2)
    images, sides = 2, (16, 8, 4, 2)
    layers = [2 * images * side**2 * (2 * (2 if block else 1)) * 9 for block, side in enumerate(sides)]
    layers.append(2 * images * 2 * 2)
    of_weights, of_inputs = sum(layers), sum(layers[1:])  # Nothing asks for the gradient of the images.
    first = of_weights + of_weights + of_inputs  # Forward, and the gradients of its two factors.
    # Each of these three kinds of product has two factors, and so two derivatives.
    second = (of_weights + of_inputs) + 2 * of_inputs + (of_weights + of_inputs)
    # torch computes one product more for the first layer: the images' gradient in the second derivative.
    assert meta_step.flops_of_step(case, "cpu") - (2 * first + second) in (0, layers[0])
