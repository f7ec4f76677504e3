"""Two gloo processes do what one does: gradients, parameters, statistics, metrics, whole runs; and fail together.

The processes are started once, for all the cases in distributed_cases.py. What is expected comes from the oracle on all
tasks at once, and from runs of this process alone.
"""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from distributed_cases import main
from distributed_learners import (
    RUN,
    TASKS,
    Counting,
    PartlyUsed,
    TwoPrecisions,
    as_after,
    assert_same_run,
    fresh,
    marked,
    stepped,
)
from face import assert_same_state, build, reference_for
from forked import CONTEXT
from models import NormedMlp, seeded
from oracle import Reference, assert_same_gradients
from torch import nn

import metawrap
from metawrap.training.run import train
from metawrap.training.torchrun import share

pytestmark = pytest.mark.skipif(
    not (torch.distributed.is_available() and torch.distributed.is_gloo_available()), reason="needs gloo"
)
# Two inner steps at epoch 0: the multi-step loss weighs them alike.
WEIGHTS = [0.5, 0.5]
SECONDS_TO_WAIT = 400  # a busy machine takes its time to import torch
Found = dict[str, Any]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the run of one process, and the same as it stood after the first epoch."""
    path = tmp_path_factory.mktemp("place")
    with torch.random.fork_rng():
        train(RUN, path / "alone")
    as_after(path / "alone", 1, path / "begun-alone")
    return path


@pytest.fixture(scope="module")
def found(place: Path) -> list[Found]:
    """What each case returned, by rank."""
    processes = [CONTEXT.Process(target=main, args=(rank, place)) for rank in (0, 1)]
    for process in processes:
        process.start()
    for process in processes:
        process.join(SECONDS_TO_WAIT)
        process.kill()
    cases = [torch.load(place / f"rank-{rank}.pt", weights_only=False) for rank in (0, 1)]
    failed = [
        f"rank {rank}, {name}: {case}" for rank in (0, 1) for name, case in cases[rank].items() if isinstance(case, str)
    ]
    assert not failed, "\n".join(failed)
    return cases


def expected(model: type[nn.Module] = NormedMlp, tasks: Any = TASKS, norm: str = "batch", **options: Any) -> Reference:
    """The oracle on all tasks."""
    parts = [task.parts() for task in tasks]
    return reference_for(seeded(model), fresh(model, norm=norm, **options), parts, WEIGHTS, norm=norm)


def assert_is(case: Found, reference: Reference, tolerance: float = 1e-9) -> None:
    assert case["loss"] == pytest.approx(float(reference.loss), rel=tolerance)
    right = [
        (p.argmax(1) == task.target_y).double().mean() for p, task in zip(reference.predictions, TASKS, strict=True)
    ]
    assert case["accuracy"] == pytest.approx(float(sum(right)) / len(right), rel=1e-6)
    assert_same_gradients(case["gradients"], reference.gradients, tolerance)
    assert_same_gradients(case["statistics"], reference.statistics, tolerance)


def assert_sgd_step(case: Found, reference: Reference, model: type[nn.Module] = NormedMlp, **options: Any) -> None:
    """The parameters are where a step of 0.1 times the oracle's gradient takes them."""
    learner = fresh(model, **options)
    for name, before in learner.named_parameters():
        local = name.removeprefix("model.") if name.startswith("model.") else _rate(name)
        gradient = reference.gradients[local]
        after = before.detach() if gradient is None else before.detach() - 0.1 * gradient
        torch.testing.assert_close(case["state"][name], after.to(before.dtype), rtol=1e-9, atol=1e-9)


def _rate(name: str) -> str:
    return "lr/" + name.removeprefix("learning_rates.").replace("/", ".").lstrip(".")


def same_on_both(found: list[Found], *path: Any) -> Any:
    """What both ranks returned there, to the last bit."""
    one, other = found
    for key in path:
        one, other = one[key], other[key]
    assert_same_state(one, other)
    return one


# --- meta_step -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["equal", "unequal"])
def test_meta_step_of_two_processes_is_that_of_all_tasks(found: list[Found], share: str) -> None:
    case, reference = same_on_both(found, "case_meta_step", share), expected()
    assert_is(case, reference)
    assert_sgd_step(case, reference)
    norm = torch.cat([g.reshape(-1) for g in reference.gradients.values() if g is not None]).norm()
    assert case["gradient_norm"] == pytest.approx(float(norm), rel=1e-9)
    steps = torch.tensor([[float(loss) for loss in losses] for losses in reference.step_losses])
    torch.testing.assert_close(case["step_losses"].float(), steps)
    assert not case["skipped"]


@pytest.mark.parametrize("way", ["threads", "measured"])
def test_tasks_in_threads_and_measured_choices_give_the_same_gradients(found: list[Found], way: str) -> None:
    for rank in found:
        assert_same_gradients(
            rank["case_in_threads_and_measured"][way], found[0]["case_meta_step"]["unequal"]["gradients"]
        )


def test_steps_of_adam_with_changing_shares_end_where_one_process_does(found: list[Found]) -> None:
    case, alone = same_on_both(found, "case_three_steps_of_adam"), build(seeded(NormedMlp))
    for _ in range(3):
        last = stepped(alone, TASKS)
    for name, value in last["state"].items():
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(case["state"][name], value, rtol=1e-9, atol=1e-9)
    assert case["loss"] == pytest.approx(last["loss"], rel=1e-9)


@pytest.mark.parametrize("norm", ["support", "running"])
def test_statistics_per_step_and_under_each_policy_are_folded_in_global_order(found: list[Found], norm: str) -> None:
    case = same_on_both(found, "case_per_step_norms_apart", norm)
    assert_is(case, expected(norm=norm, per_step_norm_statistics=norm == "running"))


def test_a_parameter_used_on_one_rank_learns_on_both_and_one_used_nowhere_has_no_gradient(found: list[Found]) -> None:
    case, reference = same_on_both(found, "case_unused"), expected(PartlyUsed, marked(TASKS))
    assert case["gradients"]["never.weight"] is None
    assert float(case["gradients"]["some"].abs().sum()) > 0
    assert_is(case, reference)
    assert_sgd_step(case, reference, PartlyUsed)


def test_parameters_of_two_precisions_are_summed_each_in_its_own(found: list[Found]) -> None:
    case = same_on_both(found, "case_two_precisions")
    assert {case["gradients"][name].dtype for name in ("scale", "linear.weight")} == {torch.float32, torch.float64}
    assert_is(case, expected(TwoPrecisions), 1e-6)


def test_stored_heads_are_those_of_all_tasks(found: list[Found]) -> None:
    heads, alone = same_on_both(found, "case_stored_heads"), fresh(head="linear", head_init="stored")
    alone.meta_step(TASKS)
    assert_same_state(heads, alone.head_start.get_extra_state()["stored"])
    assert list(heads) == [0, 1, 2, 3]


def test_edited_buffers_are_rank_zeros_everywhere_and_named(found: list[Found]) -> None:
    seen, alone = same_on_both(found, "case_edited_buffers", "seen"), [case["case_edited_buffers"] for case in found]
    first = fresh(Counting)
    first.meta_step(TASKS[:1])
    assert torch.equal(seen, first.model.seen)
    assert not torch.equal(alone[0]["alone"], alone[1]["alone"])
    for case in alone:
        assert any("edits seen" in text and "rank 0's value is kept" in text for text in case["warnings"])


# --- DistributedDataParallel -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("share", ["equal", "unequal"])
def test_ddp_gives_the_gradient_of_the_mean_over_all_tasks(found: list[Found], share: str) -> None:
    assert [case["case_ddp"][share].pop("own") for case in found] == {"equal": [2, 2], "unequal": [1, 3]}[share]
    assert_is(same_on_both(found, "case_ddp", share), expected())


@pytest.mark.parametrize("options", ["plain", "find_unused", "static"])
def test_ddp_gives_unused_parameters_zeros_and_goes_on(found: list[Found], options: str) -> None:
    rounds = [case["case_ddp_unused"][options] for case in found]
    reference = expected(PartlyUsed, marked(TASKS))
    reference.gradients |= {
        f"never.{kind}": torch.zeros_like(p) for kind, p in seeded(PartlyUsed).never.named_parameters()
    }
    reference.gradients |= {f"lr/never.{kind}": torch.zeros(2).double() for kind in ("weight", "bias")}
    assert_is(rounds[0][0], reference)
    # The parameters have not moved, so that the second round's gradients are those of the first.
    for rank in (0, 1):
        assert_same_gradients(rounds[rank][1]["gradients"], reference.gradients)


@pytest.mark.parametrize("case", ["case_ddp_around_another_module", "case_ddp_flat_memory"])
def test_ddp_around_a_module_that_holds_the_learner_and_flat_memory(found: list[Found], case: str) -> None:
    for rank in found:
        assert_is(rank[case], expected())


def test_ddp_accumulates_gradients_without_sync(found: list[Found]) -> None:
    twice = {name: None if g is None else 2 * g for name, g in expected().gradients.items()}
    assert_same_gradients(same_on_both(found, "case_ddp_accumulates", "gradients"), twice)


# --- failing together ------------------------------------------------------------------------------------------------


def test_what_fails_on_one_rank_fails_on_both_and_changes_neither(found: list[Found]) -> None:
    other, failing = (case["case_one_fails"] for case in found)
    told = {"late": "holds labels 7..9", "none": "0 (empty)", "form": "no tasks", "ddp": "labels 7"}
    for kind, words in told.items():
        assert failing[kind].startswith("TaskError: "), failing[kind]
        assert other[kind].startswith("RankError: ")
        assert words in failing[kind]
        assert words in other[kind]
        assert "rank 1" in other[kind]
    for case in (other, failing):
        assert_same_state(case["after"], case["before"])
        assert_same_state(case["after_ddp"], case["before"])
        assert_is(case["then_ddp"], expected())
    assert_is(same_on_both(found, "case_one_fails", "then"), expected())


DIFFER = {
    "seed": "'model.first.weight'",
    "loaded": "'model.linear.bias'. Build",
    "iteration": "at iteration 1, but rank 1 in meta_step at iteration 2",
    "settings": "not the same: the settings",
    "optimizer": "not the same: the optimizer",
    "new optimizer": "not the same: the optimizer",
    "new options": "'weight_decay': 0.1",
    "frozen": "model.first.bias, model.norm.bias is frozen on rank 0 or on rank 1",
    "call": "Rank 0 is in forward at iteration 0, but rank 1 in meta_step",
}


@pytest.mark.parametrize("kind", DIFFER)
def test_processes_that_differ_are_told_where(found: list[Found], kind: str) -> None:
    for case in found:
        message = case["case_not_the_same"][kind]
        assert message.startswith("RankError: ")
        assert DIFFER[kind] in message


def test_a_gradient_that_is_not_finite_on_one_rank_is_skipped_on_both(found: list[Found]) -> None:
    losses = [rank["case_not_finite"]["step"].pop("loss") for rank in found]
    norms = [rank["case_not_finite"]["step"].pop("gradient_norm") for rank in found]
    assert all(math.isnan(value) for value in losses + norms)
    case = same_on_both(found, "case_not_finite")
    assert case["step"]["skipped"]
    moved = ["skipped_steps", "_extra_state"]
    kept = {name: value for name, value in case["before"].items() if name not in moved}
    assert_same_state({name: case["step"]["state"][name] for name in kept}, kept)
    assert case["step"]["state"]["skipped_steps"].tolist() == [1, 1, 1]
    assert case["next"]["state"]["skipped_steps"].tolist() == [1, 0, 1]
    assert_is(case["next"], expected())


def test_calls_of_one_process_alone_do_not_wait_for_the_other(found: list[Found]) -> None:
    first, second = (case["case_alone"] for case in found)
    assert first["loss"] == pytest.approx(float(expected().loss))
    assert "was called by itself" in first["warnings"][0]
    assert second["ddp_eval"] > 0


REFUSED = {
    "sharded": "sharded ('model.linear.weight' by FSDP",
    "fsdp": "The learner is sharded",
    "fsdp_forward": "The learner is sharded",
    "sparse": "SparseAdam",
    "embedding": "'model.table' has sparse=True",
}


@pytest.mark.parametrize("kind", REFUSED)
def test_what_cannot_be_shared_is_refused_by_name(found: list[Found], kind: str) -> None:
    for case in found:
        assert REFUSED[kind] in case["case_refused"][kind]


# --- whole runs ------------------------------------------------------------------------------------------------------


def test_a_run_in_two_processes_is_that_of_one(place: Path, found: list[Found]) -> None:
    assert_same_run(place / "whole", place / "alone", 1e-9)
    results = [json.loads((place / name / "result.json").read_text()) for name in ("whole", "alone")]
    for norm, scores in results[0]["test"]["norms"].items():
        for name, score in scores.items():
            assert score == pytest.approx(results[1]["test"]["norms"][norm][name])
    assert [result["machine"]["processes"] for result in results] == [2, 1]
    assert same_on_both(found, "case_train", "test") == results[0]["test"]


def test_a_run_of_the_same_objects_in_two_processes_is_that_of_names_in_one(place: Path, found: list[Found]) -> None:
    assert_same_run(place / "own", place / "alone", 1e-9)
    assert "needs an object with batches(count, start)" in same_on_both(found, "case_train", "listed")


def test_a_run_goes_on_in_two_processes_and_then_again_in_one(place: Path, found: list[Found]) -> None:
    assert_same_run(place / "begun-alone", place / "alone", 1e-9)
    as_after(place / "begun-alone", 2, place / "ended-alone")
    with torch.random.fork_rng():
        train(RUN, place / "ended-alone", resume=True)
    assert_same_run(place / "ended-alone", place / "alone", 1e-9)


def test_fewer_tasks_than_processes_and_a_run_that_exists_are_refused_on_both(found: list[Found], place: Path) -> None:
    first, second = (case["case_train"] for case in found)
    assert "2 processes cannot share the 1 tasks" in first["few"]
    assert second["few"] == first["few"]
    assert not (place / "few").exists()
    assert first["taken"].startswith("CheckpointError: ")
    assert second["taken"].startswith("RankError: Rank 0 failed")


def test_dropout_differs_between_ranks_and_resumes_to_the_same_bits(place: Path, found: list[Found]) -> None:
    assert not torch.equal(*(case["case_train_with_dropout"] for case in found))
    with torch.random.fork_rng():
        torch.manual_seed(5)
        assert torch.equal(found[0]["case_train_with_dropout"], torch.rand(4))  # rank 0 goes on with what it has
    assert_same_run(place / "dropout-resumed", place / "dropout", 0)


@pytest.mark.parametrize(("count", "size"), [(8, 3), (4, 4), (5, 2), (2, 3)])
def test_shares_are_contiguous_complete_and_as_equal_as_can_be(
    monkeypatch: pytest.MonkeyPatch, count: int, size: int
) -> None:
    shares = []
    for rank in range(size):
        monkeypatch.setattr("metawrap.training.torchrun.rank", lambda rank=rank: rank)
        monkeypatch.setattr("metawrap.training.torchrun.world_size", lambda: size)
        shares.append(list(share(count)))
    assert [number for part in shares for number in part] == list(range(count))
    assert max(map(len, shares)) - min(map(len, shares)) <= 1


@pytest.mark.slow
def test_torchrun_trains_and_only_one_process_speaks(place: Path) -> None:
    folders = [
        *(str(Path(__file__).parents[1] / room) for room in ("support", "reference")),
        str(Path(metawrap.__file__).parents[1]),
    ]
    flags = ["--image-size", "8", "--inner-steps", "2", "--targets", "2", "--epochs", "3", "--iterations", "3"]
    flags += ["--batch", "3", "--validation-tasks", "4", "--test-tasks", "4", "--device", "cpu"]
    command = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "metawrap", "train"]
    ran = subprocess.run(
        [sys.executable, *command, "--model", "distributed_learners:plain_net", "--out", "torchrun", *flags],
        cwd=place,
        env=os.environ | {"PYTHONPATH": os.pathsep.join(folders), "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=SECONDS_TO_WAIT,
        check=False,
    )
    assert ran.returncode == 0, ran.stderr
    assert ran.stdout.count("after adaptation") == 1
    assert ran.stderr.count("epoch 3/3") == 1
    assert_same_run(place / "torchrun", place / "alone", 1e-9)
    result = json.loads((place / "torchrun" / "result.json").read_text())
    assert result["command"].startswith("torchrun --nproc-per-node=2 -m metawrap train")
