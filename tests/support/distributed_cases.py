"""What each of two processes does for test_distributed.py. Every function whose name starts with case_ runs in both,
one after another, in one pair of processes: starting torch costs seconds. What they return is compared there.
"""

from __future__ import annotations

import functools
import sys
import traceback
import warnings
from dataclasses import replace
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from distributed_learners import (
    DROPOUT_RUN,
    RUN,
    SHARES,
    TASKS,
    Counting,
    PartlyUsed,
    SparseEmbedding,
    TwoPrecisions,
    as_after,
    backward,
    failure,
    fresh,
    in_ddp,
    marked,
    state_of,
    stepped,
)
from face import build, snapshot
from models import NormedMlp, seeded
from torch import nn

import metawrap.training.experiment
from metawrap.training.experiment import build_experiment
from metawrap.training.run import train
from metawrap.training.torchrun import seed_dropout


def case_meta_step(rank: int, _: Path) -> Any:
    return {name: stepped(fresh(), share[rank]) for name, share in SHARES.items()}


def case_in_threads_and_measured(rank: int, _: Path) -> Any:
    # Each process measures for itself, and may choose another way: that is no difference between learners.
    ways = {"threads": {"workers": 2}, "measured": {"tune": True}}
    return {name: stepped(fresh(**way), SHARES["unequal"][rank])["gradients"] for name, way in ways.items()}


def case_three_steps_of_adam(rank: int, _: Path) -> Any:
    learner = build(seeded(NormedMlp))
    return [stepped(learner, SHARES[name][rank]) for name in ("equal", "unequal", "equal")][-1]


def case_per_step_norms_apart(rank: int, _: Path) -> Any:
    found = {}
    for norm in ("support", "running"):
        learner = fresh(norm=norm, per_step_norm_statistics=norm == "running")
        found[norm] = stepped(learner, SHARES["unequal"][rank])
    return found


def case_unused(rank: int, _: Path) -> Any:
    share = (TASKS[:1], marked(TASKS[1:]))[rank]
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that `never` and, on rank 0, `some` are unused
        return stepped(fresh(PartlyUsed), share)


def case_two_precisions(rank: int, _: Path) -> Any:
    return stepped(fresh(TwoPrecisions), SHARES["unequal"][rank])


def case_ddp(rank: int, _: Path) -> Any:
    found = {}
    for name, share in SHARES.items():
        learner = fresh()
        found[name] = backward(in_ddp(learner), learner, share[rank])
    return found


def case_ddp_unused(rank: int, _: Path) -> Any:
    """Two rounds: DDP complains of a missing gradient at the second."""
    share = (TASKS[:1], marked(TASKS[1:]))[rank]
    found = {}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        for name, options in {
            "plain": {},
            "find_unused": {"find_unused_parameters": True},
            "static": {"static_graph": True},
        }.items():
            learner = fresh(PartlyUsed)
            ddp = in_ddp(learner, **options)
            found[name] = [backward(ddp, learner, share) for _ in range(2)]
    return found


def case_ddp_around_another_module(rank: int, _: Path) -> Any:
    class Outer(nn.Module):
        def __init__(self, learner: Any) -> None:
            super().__init__()
            self.learner = learner

        def forward(self, tasks: Any) -> Any:
            return self.learner(tasks)

    learner = fresh()
    return backward(in_ddp(Outer(learner)), learner, SHARES["unequal"][rank])


def case_ddp_accumulates(rank: int, _: Path) -> Any:
    learner = fresh()
    ddp = in_ddp(learner)
    with ddp.no_sync():
        ddp(SHARES["unequal"][rank]).loss.backward()
    ddp(SHARES["equal"][rank]).loss.backward()
    return state_of(learner)


def case_ddp_flat_memory(rank: int, _: Path) -> Any:
    learner = fresh(memory="flat")
    return backward(in_ddp(learner), learner, SHARES["unequal"][rank])


def case_one_fails(rank: int, _: Path) -> Any:
    good = SHARES["equal"][rank]
    late = replace(good[1], target_y=good[1].target_y + 7)  # fails in its target pass, after a whole task
    bad = {"late": [good[0], late], "none": [], "form": "no tasks"}
    learner = fresh()
    before = snapshot(learner.state_dict())
    found: dict[str, Any] = {
        kind: failure(lambda tasks=tasks: learner.meta_step(tasks if rank == 1 else good))
        for kind, tasks in bad.items()
    }
    found["before"], found["after"] = before, snapshot(learner.state_dict())
    ddp = in_ddp(learner)
    found["ddp"] = failure(lambda: ddp(bad["late"] if rank == 1 else good))
    found["after_ddp"] = snapshot(learner.state_dict())
    copied = fresh()
    again = in_ddp(copied)
    failure(lambda: again(bad["late"] if rank == 1 else good))
    found["then_ddp"] = backward(again, copied, good)
    found["then"] = stepped(learner, good)
    return found


def case_not_the_same(rank: int, _: Path) -> Any:
    good = SHARES["equal"][rank]
    ahead = fresh()
    ahead.meta_step(good)
    ahead.iteration += rank
    loaded = fresh()
    loaded.meta_step(good)
    if rank == 1:
        state = loaded.state_dict()
        state["model.linear.bias"] = state["model.linear.bias"] + 1
        loaded.load_state_dict(state)
    rates = fresh(optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1 + rank))
    # With moments, which a new one lacks.
    later = fresh(optimizer=lambda parameters: torch.optim.Adam(parameters, lr=0.1))
    faster = fresh()
    for learner in (later, faster):
        learner.meta_step(good)
    if rank == 1:
        later.optimizer = type(later.optimizer)(later.parameters(), **later.optimizer.defaults)
        faster.optimizer.param_groups[0]["weight_decay"] = 0.1
    frozen = fresh()
    frozen.meta_step(good)
    (frozen.model.first.bias, frozen.model.norm.bias)[rank].requires_grad_(False)
    other = fresh()
    ddp = in_ddp(other)
    return {
        "seed": failure(lambda: fresh(seed=rank).meta_step(good)),
        "iteration": failure(lambda: ahead.meta_step(good)),
        "loaded": failure(lambda: loaded.meta_step(good)),
        "settings": failure(lambda: fresh(inner_momentum=0.1 * rank).meta_step(good)),
        "optimizer": failure(lambda: rates.meta_step(good)),
        "new optimizer": failure(lambda: later.meta_step(good)),
        "new options": failure(lambda: faster.meta_step(good)),
        "frozen": failure(lambda: frozen.meta_step(good)),
        "call": failure(lambda: (other.meta_step if rank else ddp)(good)),
    }


def case_not_finite(rank: int, _: Path) -> Any:
    learner = fresh()
    good = SHARES["equal"][rank]
    bad = [good[0], replace(good[1], target_x=good[1].target_x * float("nan"))]
    before = snapshot(learner.state_dict())
    found = stepped(learner, bad if rank == 1 else good)
    return {"before": before, "step": found, "next": stepped(learner, good)}


def case_stored_heads(rank: int, _: Path) -> Any:
    learner = fresh(head="linear", head_init="stored")
    learner.meta_step(SHARES["unequal"][rank])
    return learner.head_start.get_extra_state()["stored"]


def case_edited_buffers(rank: int, _: Path) -> Any:
    learner = fresh(Counting)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        learner.meta_step(SHARES["unequal"][rank])
    alone = fresh(Counting)
    alone.distributed = False
    alone.meta_step(SHARES["unequal"][rank])
    return {"seen": learner.model.seen, "alone": alone.model.seen, "warnings": [str(w.message) for w in caught]}


def case_alone(rank: int, _: Path) -> Any:
    """Calls that only one process makes, so that waiting for the other would hang."""
    learner = fresh()
    found: dict[str, Any] = {}
    if rank == 0:
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            found["loss"] = float(learner(TASKS).loss.detach())
        found["warnings"] = [str(w.message) for w in caught]
        found["evaluated"] = learner.evaluate(TASKS).mean
        learner.eval()(TASKS)
        learner.train().adapt(TASKS[0].support_x, TASKS[0].support_y)
        learner.distributed = False
        learner(TASKS)
        learner.meta_step(TASKS)
    ddp = in_ddp(fresh()).eval()
    if rank == 1:
        with torch.no_grad():
            found["ddp_eval"] = float(ddp(TASKS).loss)
    return found


def case_refused(rank: int, _: Path) -> Any:
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard
    from torch.distributed.tensor import Shard, distribute_tensor

    good = SHARES["equal"][rank]
    mesh = init_device_mesh("cpu", (2,))
    sharded = fresh()
    sharded.model.linear.weight = nn.Parameter(
        distribute_tensor(sharded.model.linear.weight.detach(), mesh, [Shard(0)])
    )
    sparse = fresh(optimizer=lambda parameters: torch.optim.SparseAdam(list(parameters)))
    embedding = in_ddp(fresh(SparseEmbedding))
    fsdp = fresh()
    fully_shard(fsdp, mesh=mesh)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # that forward is called by itself
        forward = failure(lambda: fsdp(good))
    return {
        "fsdp_forward": forward,
        "sharded": failure(lambda: sharded.meta_step(good)),
        "embedding": failure(lambda: embedding(good)),
        "sparse": failure(lambda: sparse.meta_step(good)),
        "fsdp": failure(lambda: fsdp.meta_step(good)),
    }


def case_train(rank: int, folder: Path) -> Any:
    """A whole run, and one whose first epoch was made by one process, which will make the last one, too."""
    result = train(RUN, folder / "whole")
    train(RUN, folder / "begun-alone", resume=True)
    few = failure(lambda: train(replace(RUN, tasks_per_batch=1), folder / "few"))
    taken = failure(lambda: train(RUN, folder / "whole"))
    made = build_experiment(RUN)
    parts, counts = (
        (made.train, made.validation, made.test),
        {"validation_tasks": RUN.validation_tasks, "test_tasks": 4},
    )
    metawrap.train(made.learner, *parts, out=folder / "own", **counts)
    listed = failure(lambda: metawrap.train(made.learner, [made.train.batch(0)], out=folder / "listed"))
    return {"test": result["test"], "few": few, "taken": taken, "listed": listed}


def case_train_with_dropout(rank: int, folder: Path) -> Any:
    """A whole run, and the same, resumed after an epoch with other random states than the first had by then."""
    train(DROPOUT_RUN, folder / "dropout")
    if rank == 0:
        as_after(folder / "dropout", 1, folder / "dropout-resumed")
    torch.manual_seed(99 + rank)
    train(DROPOUT_RUN, folder / "dropout-resumed", resume=True)
    torch.manual_seed(5)
    seed_dropout(7, 3)
    return torch.rand(4)


def main(rank: int, folder: Path) -> None:
    """Runs every case and saves what they return, or how they failed."""
    torch.set_num_threads(1)
    warnings.simplefilter("error")
    metawrap.training.experiment.load_data = functools.cache(metawrap.training.experiment.load_data)
    cases = {name: case for name, case in globals().items() if name.startswith("case_")}
    # So that a fault ends the tests rather than holding them up for gloo's half hour.
    timeout = timedelta(seconds=60)
    dist.init_process_group("gloo", f"file://{folder}/meeting", rank=rank, world_size=2, timeout=timeout)
    found: dict[str, Any] = {}
    for name, case in cases.items():
        try:
            found[name] = case(rank, folder)
        except BaseException:
            found[name] = traceback.format_exc()
            print(f"rank {rank}, {name}:\n{found[name]}", file=sys.stderr)
            break
    torch.save(found, folder / f"rank-{rank}.pt")
    dist.destroy_process_group()
