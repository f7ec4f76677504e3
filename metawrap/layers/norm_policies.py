"""Batch-norm policies: which statistics normalise the support pass, and which the target pass, of a task."""

from __future__ import annotations

from typing import Literal, NamedTuple

NormPolicy = Literal["batch", "running", "support", "task", "task_layer"]
# How TaskNorm sees an example: by each channel alone (TaskNorm-I), or by all channels (TaskNorm-L).
BLENDS: dict[str, Literal["instance", "layer"]] = {"task": "instance", "task_layer": "layer"}

Statistics = Literal[
    "batch", "running", "capture", "captured", "shifted", "blended", "blended_capture", "blended_captured"
]
"""batch: the batch's own. running: the stored row. capture: the batch's own, kept for a later pass with gradients.
captured: those of the last capturing pass (conditional batch norm). shifted: these, moved by the stored row of shifts.
blended: the batch's own with those of each example (TaskNorm); blended_capture, blended_captured: likewise."""


class Passes(NamedTuple):
    """The statistics of each pass through a network; the context pass, if any, sees the support set once more."""

    support: Statistics
    context: Statistics | None
    target: Statistics


# Of an inner loop, in training and evaluation alike.
PASSES: dict[str, Passes] = {
    "batch": Passes("batch", None, "batch"),
    "running": Passes("batch", "capture", "shifted"),
    "support": Passes("batch", "capture", "captured"),
    **dict.fromkeys(BLENDS, Passes("blended", "blended_capture", "blended_captured")),
}


def passes_of(norm: str, *, training: bool) -> Passes:
    """The passes of a method without an inner loop: under "running" batch norm is that of any supervised training."""
    if norm == "running":
        return PASSES["batch"] if training else Passes("running", None, "running")
    return PASSES[norm]


def policies_of(norm: str, *, inner_loop: bool) -> list[str]:
    """The policies that a learner made with `norm` can tell apart: its own first.

    An inner loop has rows of its own for "running" only if it was trained under it, and a blend likewise.
    """
    others = ["batch", "support"] if inner_loop else ["batch", "running", "support"]
    return [norm, *(name for name in others if name != norm)]


def kind_of(norm: str) -> str:
    """Whether a target's prediction depends on the other targets."""
    return "transductive" if norm == "batch" else "inductive"
