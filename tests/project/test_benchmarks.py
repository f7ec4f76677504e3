"""The benchmarks check what they time, and run from end to end at a tiny size; no time is asserted."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

# In the project's settings, pytest puts benchmarks/ on the path, as running a script from there does.
import cases
import compare
import competitors
import gpu
import measure
import oracle
import pytest
import torch
from cases import Case
from competitors import SETTINGS, Setting
from plain import PlainLoop

TINY = Case("A", ways=3, targets=2, tasks=3, steps=2, side=16, filters=3)
PNG = b"\x89PNG"


def agreement_of(name: str, case: Case = TINY) -> dict[str, Any]:
    (record,) = measure.agreement(case, [name], "cpu")
    return record


@pytest.fixture
def here(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Measures in this process, and leaves its threads and cores alone: a process for each takes seconds to start."""
    threads = torch.get_num_threads()

    def in_this_process(job: str, case: Case, shared: dict[str, Any], **arguments: Any) -> Iterator[dict[str, Any]]:
        threads = {} if job == "agreement" else {"threads": shared["threads"]}
        found = list(measure.JOBS[job](case, device="cpu", **threads, **arguments))
        return iter(json.loads(json.dumps(found)))

    monkeypatch.setattr(compare, "in_child", in_this_process)
    for script in (compare, gpu):
        monkeypatch.setattr(script, "use_threads", lambda *_: None)
    yield
    torch.set_num_threads(threads)


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[..., list[dict[str, Any]]]:
    def run(script: Any, *flags: str) -> list[dict[str, Any]]:
        name = Path(script.__file__).stem
        always = ["--small", "--repeats", "2", "--threads", "1", "--out", str(tmp_path)]
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *always, *flags])
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


@pytest.mark.parametrize("name", ["metawrap functional", "metawrap flat", "metawrap first-order", "higher", "torchopt"])
def test_a_meta_step_has_the_plain_loops_gradient(name: str) -> None:
    for module in SETTINGS[name].needs:
        pytest.importorskip(module)
    record = agreement_of(name)
    assert record["kind"] == "agreement", record
    assert record["relative_error"] < 1e-9


@pytest.mark.slow
def test_a_jitted_meta_step_has_the_plain_loops_gradient() -> None:
    pytest.importorskip("jax")
    # As wide as the cases: a pooling whose gradient was wrong showed from here on.
    assert agreement_of("jax", Case("wide", tasks=1, steps=1))["relative_error"] < 1e-9


class HalfRight(PlainLoop):
    """Wrong in one small tensor."""

    def gradients(self) -> dict[str, torch.Tensor]:
        found = super().gradients()
        return found | {"conv3.norm.bias": found["conv3.norm.bias"] * (1 + 1e-6)}


class OneShort(PlainLoop):
    """Forgets to learn a rate."""

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
def test_a_wrong_gradient_is_told_with_its_tensor(
    kind: type[PlainLoop], tensor: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(SETTINGS, "wrong", Setting("wrong", "peer", kind))
    record = agreement_of("wrong")
    assert not record["agrees"]
    assert record["worst_tensor"] == tensor


def test_what_this_machine_lacks_is_left_out_by_name(monkeypatch: pytest.MonkeyPatch) -> None:
    for options, reason in (({"haste": True}, "no haste="), ({"engine": "steam"}, "'steam'")):
        monkeypatch.setitem(SETTINGS, "new", Setting("new", "metawrap", competitors.Metawrap, options))
        record = agreement_of("new")
        assert record["kind"] == "skipped"
        assert reason in record["reason"]
    monkeypatch.setitem(sys.modules, "torchopt", None)  # As if it were not there.
    record = agreement_of("torchopt")
    assert (record["kind"], "torchopt" in record["reason"]) == ("skipped", True)


@pytest.mark.usefixtures("here")
def test_a_comparison_writes_records_and_pictures(
    run: Callable[..., list[dict[str, Any]]],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    pytest.importorskip("matplotlib")
    wrong = Setting("learn2learn", "peer", HalfRight)
    monkeypatch.setitem(SETTINGS, "learn2learn", wrong)
    # SETTINGS is one dictionary in all modules, so the comparison sees the stand-in.
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


def test_a_measurement_in_its_own_process_returns_its_records() -> None:
    shared = {"device": "cpu", "threads": 1, "allocator": "default"}
    (record,) = measure.in_child("memory", TINY, shared, name="plain")
    assert (record["kind"], record["setting"], record["allocator"]) == ("memory", "plain", "default")
    assert record["peak_mb"] >= 0


def test_a_competitor_apart_steps_when_told_and_ends_when_closed() -> None:
    competitor = measure.Apart(TINY, {"device": "cpu", "threads": 1, "allocator": "default"}, "plain")
    competitor.step()
    competitor.step()
    competitor.close()
    assert competitor._process.returncode == 0


def test_a_process_that_dies_is_a_failure_with_its_status(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(measure, "__file__", str(Path(__file__).parent / "no_such_script.py"))
    shared = {"device": "cpu", "threads": 1, "allocator": "default"}
    (record,) = measure.in_child("memory", TINY, shared, name="plain")
    assert (record["kind"], record["setting"]) == ("failed", "plain")
    assert "status 2" in record["reason"]


@pytest.mark.usefixtures("here")
def test_the_gpu_script_runs_on_the_cpu_with_operations_for_kernels(
    run: Callable[..., list[dict[str, Any]]],
) -> None:
    records = run(gpu, "--device", "cpu", "--cases", "A", "--only", "metawrap functional")
    kinds = {record["kind"] for record in records}
    assert kinds == {"bandwidth ceiling", "convolution ceiling", "agreement", "cpu"}
    (found,) = (r for r in records if r["kind"] == "cpu" and r["setting"] == "metawrap functional")
    assert "kernels" not in found
    assert found["operations"] > 100
    assert found["convolution_percent"] > 0
    assert found["bandwidth_percent"] > 0


def test_flops_of_a_meta_step_are_those_that_a_count_by_hand_gives() -> None:
    case = Case("one", ways=2, tasks=1, steps=1, side=16, channels=1, filters=2)
    images, sides = 2, (16, 8, 4, 2)
    layers = [2 * images * side**2 * (2 * (2 if block else 1)) * 9 for block, side in enumerate(sides)]
    layers.append(2 * images * 2 * 2)
    of_weights, of_inputs = sum(layers), sum(layers[1:])  # The images' own gradient is nobody's.
    first = of_weights + of_weights + of_inputs  # Forward, and the gradients of its two factors.
    # Each of these three kinds of product has two factors, and so two derivatives.
    second = (of_weights + of_inputs) + 2 * of_inputs + (of_weights + of_inputs)
    # torch makes one product more for the first layer, the images' gradient in the second derivative.
    assert gpu.flops_of_step(case, "cpu") - (2 * first + second) in (0, layers[0])
