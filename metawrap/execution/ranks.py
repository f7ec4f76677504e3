"""Processes that share a meta-step: each solves its own tasks, and all make the same outer update.

Outcomes or an error -> one exchange of plain values (errors, shapes) -> one sum of tensors for each dtype. It holds the
gradients and the outcomes of all tasks; each outcome has a place of its own, so that the sum gathers them in task
order. A process without a group, or alone in one, exchanges nothing.
"""

from __future__ import annotations

import hashlib
import sys
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from metawrap.engines.calling import dense
from metawrap.errors import ArgumentError, MetaWrapWarning, RankError, UnsupportedModuleError
from metawrap.inner_loop.inner_loop import with_gradients
from metawrap.layers.per_step_norm import PerStepNorm
from metawrap.results import MetaOutput, TaskOutcome, mean_loss, meta_output
from metawrap.snapshot.module_state import Slot, slots_of
from metawrap.tasks import device_of, map_tensors, tensors_in

Gradients = Sequence[Tensor | None]
# Options of an optimizer that do not change its update.
_NO_PART = ("params", "param_names", "foreach", "fused", "capturable", "differentiable")
_NO_PREDICTION = "predictions stay where they were made"


@dataclass
class _Word:
    """What one process tells the others: that it failed, or what there is to add up and to gather.

    call: which call at which iteration it is in. checked: whether it knows that all learners are the same. frozen:
    which parameters are not learned. optimizer: its kind and options, without its state. present: which of the others
    have a gradient. solved: the tasks' outcomes, their tensors on the meta device. edited: buffers and parameters that
    forward edited.
    """

    error: str | None = None
    call: tuple[str, int] = ("", 0)
    checked: bool = True
    frozen: list[str] = field(default_factory=list)
    optimizer: str = ""
    present: list[bool] = field(default_factory=list)
    solved: list[TaskOutcome] = field(default_factory=list)
    edited: list[str] = field(default_factory=list)


class Ranks:
    """The processes that share one call of a learner; made where the call begins.

    size: how many; 1 is this process alone. rank: which one this is. in_ddp: whether the gradients are the business of
    a `DistributedDataParallel` around the learner.
    """

    def __init__(self, learner: Any, call: str, group: Any, in_ddp: bool = False) -> None:
        self.learner, self.call, self.group, self.in_ddp = learner, call, group, in_ddp
        self.rank, self.size = (dist.get_rank(group), dist.get_world_size(group)) if group is not None else (0, 1)
        self._before = _state_slots(learner.model) if self.size > 1 else []

    @classmethod
    def of_meta_step(cls, learner: Any) -> Ranks:
        """All processes of the program, unless the learner is told that it is on its own."""
        return cls(learner, "meta_step", dist.group.WORLD if learner.distributed and several() else None)

    @classmethod
    def of_forward(cls, learner: Any) -> Ranks:
        """Those of the `DistributedDataParallel` whose forward is running around the learner's, if there is one."""
        if not learner.distributed:
            return cls(learner, "forward", None)
        # The marker that torch's own compiler goes by: it is set for the time of the wrapped module's forward.
        active = DistributedDataParallel._get_active_ddp_module()  # type: ignore[no-untyped-call]
        if active is not None and any(module is learner for module in active.modules()):
            return cls(learner, "forward", active.process_group, in_ddp=True)
        _warn_alone(learner)
        return cls(learner, "forward", None)

    @contextmanager
    def together(self) -> Iterator[None]:
        """What fails in here on one process fails on all: the others hear of it where they wait, in `shared`.

        A KeyboardInterrupt is not sent to the other processes; their exchange fails.
        """
        try:
            self._refuse()
            yield
        except Exception as error:
            if self.size > 1:
                with suppress(RankError):  # This one is to be raised, even if nobody is left to tell.
                    self._gathered(_Word(f"{type(error).__name__}: {error}"))
            raise

    def shared(
        self, solved: Sequence[TaskOutcome], parameters: Sequence[Tensor] = (), gradients: Gradients = ()
    ) -> tuple[list[TaskOutcome], list[Tensor | None]]:
        """The outcomes of all processes' tasks, rank 0's first, and the gradient of the mean over them.

        A parameter without a gradient on any process has none; what is given is returned where there is one process.

        Args:
            solved: this process's tasks, without graphs.
            parameters, gradients: the gradient of the mean over these tasks.
        Raises:
            RankError: a process failed, is gone or in another call, or its learner is not the same as here.
        """
        if self.size == 1:
            return list(solved), list(gradients)
        own = [replace(one, prediction=_NO_PREDICTION) for one in solved]
        words = self._gathered(
            _Word(
                call=(self.call, self.learner.iteration),
                checked=self.learner.executor.same_everywhere,
                frozen=[name for name, p in self.learner.named_parameters() if not p.requires_grad],
                optimizer=_update_in_words(self.learner) if self.call == "meta_step" else "",
                present=[gradient is not None for gradient in gradients],
                solved=map_tensors(own, lambda tensor: tensor.to("meta")),
                edited=[slot.name for slot in self._before if slot.edited()],
            )
        )
        self._check_all_here(words)
        edited = sorted({name for word in words for name in word.edited})
        if not all(word.checked for word in words):
            self._check_same_learner(edited)
        self._take_edited(edited)
        tasks = sum(len(word.solved) for word in words)
        present = [any(flags) for flags in zip(*(word.present for word in words), strict=True)]
        addends = [
            torch.zeros_like(parameter) if gradient is None else dense(gradient) * len(own)
            for parameter, gradient, there in zip(parameters, gradients, present, strict=True)
            if there
        ]
        for rank, word in enumerate(words):
            places = tensors_in(word.solved)
            addends += tensors_in(own) if rank == self.rank else [_zeros(place, self.learner) for place in places]
        summed = iter(self._summed(addends))
        mean = [next(summed) / tasks if there else None for there in present]
        everyone = [one for word in words for one in map_tensors(word.solved, lambda _: next(summed))]
        return everyone, mean

    def averaged(self, output: MetaOutput, own: int, everyone: Sequence[TaskOutcome]) -> MetaOutput:
        """Inside of DDP, the output with loss and accuracy over all tasks; else the output as it is.

        The mean over processes of the loss's gradient, which DDP takes, is the gradient of the mean over all tasks.
        Every parameter gets a gradient: DDP would wait for a missing one. Differentiable once.

        Args:
            output: of this process's `own` tasks. everyone: the outcomes of all processes' tasks.
        """
        if not self.in_ddp:
            return output
        whole, loss = meta_output(everyone, mean_loss(everyone)), output.loss
        parameters = [p for p in self.learner.parameters() if p.requires_grad]
        weight = torch.tensor(own * self.size / len(everyone), dtype=loss.dtype, device=loss.device)
        nothing = [(p, p.detach().new_zeros(()).expand_as(p)) for p in parameters]
        loss = with_gradients(whole.loss, [(loss, weight), *nothing])
        return output._replace(loss=loss, accuracy=whole.accuracy)

    def _refuse(self) -> None:
        """Raises what cannot be shared, by name."""
        # A parameter can only be a DTensor, and a module FSDP's, where these were imported.
        sharded: Any = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", ())
        wrapped: Any = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", ())
        parts = [*self.learner.named_parameters(), *self.learner.named_modules()] if sharded or wrapped else []
        names = [f"'{name}'" for name, part in parts if isinstance(part, (sharded, wrapped))]
        if names:
            raise UnsupportedModuleError(
                f"The learner is sharded ({', '.join(names[:3])} by FSDP or as DTensor): fast weights are made from "
                "whole parameters. Use meta_step or DistributedDataParallel, which keep them whole."
            )
        modules = self.learner.named_modules() if self.in_ddp else ()
        if sparse := [name for name, m in modules if isinstance(m, nn.Embedding | nn.EmbeddingBag) and m.sparse]:
            raise UnsupportedModuleError(
                f"'{sparse[0]}' has sparse=True: DistributedDataParallel waits for a sparse gradient, but that of a "
                "meta-loss is dense. Set sparse=False, or use meta_step."
            )
        if self.size > 1 and isinstance(self.learner.optimizer, torch.optim.SparseAdam):
            raise ArgumentError(
                "optimizer: SparseAdam takes sparse gradients only, but those of several processes are added as dense "
                "ones. Use another optimizer, such as Adam."
            )

    def _gathered(self, value: Any) -> list[Any]:
        values: list[Any] = [None] * self.size
        with exchanging():
            dist.all_gather_object(values, value, group=self.group)
        return values

    def _summed(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor's sum over all processes, in one reduction per dtype."""
        summed = list(tensors)
        for dtype in {tensor.dtype: None for tensor in tensors}:
            places = [place for place, tensor in enumerate(tensors) if tensor.dtype == dtype]
            flat = torch.cat([tensors[place].reshape(-1) for place in places])
            with exchanging():
                dist.all_reduce(flat, group=self.group)
            parts = torch.split(flat, [tensors[place].numel() for place in places])
            for place, part in zip(places, parts, strict=True):
                # Of its own memory, laid out as the parameter's: a kept head must not hold all gradients.
                summed[place] = torch.empty_like(tensors[place]).copy_(part.view(tensors[place].shape))
        return summed

    def _check_all_here(self, words: Sequence[_Word]) -> None:
        for rank, word in enumerate(words):
            if word.error is not None:
                raise RankError(f"{self.call} failed on rank {rank}, and so on all: {word.error}")
        for rank, word in enumerate(words):
            if word.call != words[0].call:
                (there, first), (here, other) = words[0].call, word.call
                raise RankError(
                    f"Rank 0 is in {there} at iteration {first}, but rank {rank} in {here} at iteration {other}. All "
                    "processes must make the same calls, and load the same state, learner.iteration included."
                )
            if word.frozen != words[0].frozen:
                names = sorted(set(word.frozen) ^ set(words[0].frozen))
                raise RankError(f"{', '.join(names)} is frozen on rank 0 or on rank {rank}, but not on both.")
            if word.optimizer != words[0].optimizer:
                raise RankError(
                    f"The learners of rank 0 and rank {rank} are not the same: the optimizer is {words[0].optimizer} "
                    f"there, and {word.optimizer} here. Give all processes the same, with the same options."
                )

    def _check_same_learner(self, edited: Sequence[str]) -> None:
        prints = self._gathered(_prints(self.learner, edited))
        for rank, other in enumerate(prints):
            differing = [name for name in prints[0] | other if prints[0].get(name) != other.get(name)]
            if differing:
                listed = ", ".join(differing[:3]) + (f" and {len(differing) - 3} more" if len(differing) > 3 else "")
                raise RankError(
                    f"The learners of rank 0 and rank {rank} are not the same: {listed}. Build the model under the "
                    "same seed on all processes (torch.manual_seed), or load the same state; for learners that have "
                    "nothing to do with each other set learner.distributed = False."
                )
        self.learner.executor.same_everywhere = True

    def _take_edited(self, edited: Sequence[str]) -> None:
        """Gives every process rank 0's value of what forward edited on one of them: there is no order to do it in."""
        if not edited:
            return
        slots = {slot.name: slot for slot in self._before}
        values = [slots[name].table[slots[name].local].detach().cpu() for name in edited]
        with exchanging():
            dist.broadcast_object_list(values, src=dist.get_global_rank(self.group, 0), group=self.group)
        taken: dict[int, Tensor] = {}
        for name, value in zip(edited, values, strict=True):
            table, local = slots[name].table, slots[name].local
            present = table[local]
            if isinstance(present, nn.Parameter):
                present.data.copy_(value)
            else:
                # Not in place: the graph of this call may need what stands there.
                table[local] = taken.setdefault(id(present), value.to(present.device))
        warnings.warn(
            f"The model's forward edits {', '.join(edited)}, task after task. Across processes there is no such order: "
            "rank 0's value is kept, and what the tasks of other ranks did to it is lost.",
            MetaWrapWarning,
            stacklevel=4,
        )


def _warn_alone(learner: Any) -> None:
    if several() and any(isinstance(module, PerStepNorm) for module in learner.model.modules()):
        warnings.warn(
            "learner(task_batch) was called by itself in a program of several processes: its gradients and running "
            "statistics are those of this process's tasks. Call it through DistributedDataParallel(learner), use "
            "meta_step, or set learner.distributed = False if that is meant.",
            MetaWrapWarning,
            stacklevel=4,
        )


def several() -> bool:
    """Whether this is one of several processes of torch's default group."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


@contextmanager
def exchanging() -> Iterator[None]:
    """Makes a RankError of what torch raises when another process is gone."""
    try:
        yield
    except RuntimeError as error:
        raise RankError(
            f"The exchange with the other processes failed: {str(error).splitlines()[0]}. Where one of them has "
            "stopped, its own message says why."
        ) from error


def _state_slots(model: nn.Module) -> list[Slot]:
    named = list(model.named_modules())
    # Per-step norms fold their statistics from the gathered moments.
    slots = slots_of(named, "_parameters", copies=False) + slots_of(named, copies=False, norms=False)
    return [slot for slot in slots if slot.tensor is not None]


def _zeros(place: Tensor, learner: Any) -> Tensor:
    return torch.zeros_like(place, device=device_of(learner))


def _prints(learner: Any, edited: Sequence[str]) -> dict[str, str]:
    """All that an outer update depends on, but for what was just edited, by name: texts, equal where it is equal."""
    optimizer, skipped = learner.optimizer, {f"model.{name}" for name in edited}
    state: dict[str, Any] = {f"'{name}'": value for name, value in learner.state_dict().items() if name not in skipped}
    # The counters; what each process measured is its own.
    state["'_extra_state'"] = learner.iteration
    state["the settings"] = repr(learner.settings)
    state["the optimizer"] = [_update_in_words(learner), tensors_in(optimizer.state_dict()["state"])]
    return {name: repr(map_tensors(value, _digest)) for name, value in state.items()}


def _update_in_words(learner: Any) -> str:
    optimizer = learner.optimizer
    groups = [{k: v for k, v in group.items() if k not in _NO_PART} for group in optimizer.param_groups]
    return f"{type(optimizer).__name__} {groups}"


def _digest(tensor: Tensor) -> Any:
    plain = dense(tensor.detach()).resolve_conj().resolve_neg().cpu().contiguous()
    content = hashlib.sha256(plain.reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()
    return f"{tensor.dtype} {tuple(tensor.shape)} {content}"
