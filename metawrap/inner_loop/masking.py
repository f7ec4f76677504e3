"""A task with fewer classes than the network has outputs: the unused outputs are masked, on request."""

from __future__ import annotations

import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from metawrap.engines import first_line
from metawrap.errors import TaskError
from metawrap.outputs import LeftOut, left_out, prediction_for, prediction_in, takes_tensors
from metawrap.results import IGNORED, are_logits, class_loss
from metawrap.snapshot.generators import Generators
from metawrap.tasks import Task, describe_value, map_tensors


def used_labels(task: Task, ignored: int = IGNORED) -> Tensor:
    """The classes of the support set, ascending.

    Raises:
        TaskError: the labels are no classes, or the target set has a class that the support set lacks.
    """
    found: list[Tensor] = []
    for part in ("support", "target"):
        labels = getattr(task, f"{part}_y")
        if not isinstance(labels, Tensor) or labels.is_floating_point() or labels.is_complex():
            raise TaskError(
                f"mask_unused_outputs=True needs whole numbers as labels, but {part}_y is {describe_value(labels)}. "
                "Pass class numbers (labels.argmax(1) of one-hot rows) and F.cross_entropy, or leave it False, as for "
                "regression."
            )
        found.append(torch.unique(labels[labels != ignored]).long())
    support, target = found
    if missing := sorted(set(target.tolist()) - set(support.tolist())):
        raise TaskError(
            f"mask_unused_outputs=True: target_y holds classes {missing}, which the support set has not shown. "
            "Their outputs would be masked: leave such targets out, or show the classes."
        )
    return support


class MaskRefusedError(TaskError):
    """The loss, or the output, leaves no place for a mask."""


class _Unmasked(LeftOut):
    error = MaskRefusedError
    words = (
        "mask_unused_outputs=True masks the prediction alone, but loss_fn reads another tensor of its shape from the "
        "network's output. Leave it False, and select the task's outputs in loss_fn."
    )


@dataclass(frozen=True)
class Mask:
    """Takes the outputs of all classes but `used` (ascending) out of a task, so that the others share its probability.

    Logits get minus infinity there, and log-probabilities are made to sum to one again: the loss is then that of a
    network without these outputs. Cross-entropy and nll_loss keep that promise; any other loss is tried at each pass.
    """

    used: Tensor
    loss_fn: Any

    def judged(self, output: Any, y: Any, loss: Callable[[Any, Any], Tensor]) -> tuple[Any, Tensor]:
        """The output with its prediction masked, and the loss of that.

        Args:
            output: the network's; its prediction is (examples, classes, ...). y: (examples, ...).
            loss: `loss(output, y)` to a scalar.
        Raises:
            TaskError: the outputs cannot be masked, or the loss does not leave masked outputs out.
        """
        prediction, masked, unused, shown = self._masked(output, y)
        hidden = None if takes_tensors(self.loss_fn) else left_out(_Unmasked)

        def around(other: Tensor) -> Any:
            def changed(tensor: Tensor) -> Tensor:
                kept = hidden if hidden is not None and tensor.shape == prediction.shape else tensor
                return other if tensor is prediction else kept

            return map_tensors(output, changed)

        value = loss(around(masked), y)
        if class_loss(self.loss_fn) not in (F.cross_entropy, F.nll_loss) or not bool(value.isfinite()):
            with torch.no_grad():
                self._check(value.detach(), prediction.detach(), masked.detach(), unused, y, around)
        return shown, value

    def masked(self, output: Any, y: Any) -> Any:
        """The output with its prediction masked."""
        return self._masked(output, y)[-1]

    def _masked(self, output: Any, y: Any) -> tuple[Tensor, Tensor, Tensor, Any]:
        """The prediction, the masked prediction, the unused classes, and the output with its prediction masked."""
        found = prediction_in(output)
        prediction = output if found is None else found
        unused = self._unused(prediction, y)
        masked: Tensor = prediction.masked_fill(unused, -torch.inf)
        if class_loss(self.loss_fn) is not F.cross_entropy and self._sums_to_one(prediction.detach()):
            masked = masked.log_softmax(1)
        shown = map_tensors(output, lambda tensor: masked if tensor is prediction else tensor)
        if prediction_in(shown) is not masked:
            raise MaskRefusedError(
                "mask_unused_outputs=True: the model returns its prediction in an object in which no other can take "
                f"its place, {describe_value(output)}. Return it in a dict, or leave it False, and mask in loss_fn."
            )
        return prediction, masked, unused, shown

    def _unused(self, prediction: Any, y: Any) -> Tensor:
        if not are_logits(prediction, y) or (prediction.ndim > 2 and class_loss(self.loss_fn) is None):
            raise TaskError(
                "mask_unused_outputs=True needs logits of shape (examples, classes, ...) for labels of shape "
                "(examples, ...), and further axes only with torch's own losses, which take classes on the second, but "
                f"the model returns {describe_value(prediction)} for {describe_value(y)}. Leave it False, and mask in "
                "loss_fn."
            )
        classes = prediction.shape[1]
        if len(self.used) and not 0 <= int(self.used[0]) <= int(self.used[-1]) < classes:
            raise TaskError(
                f"support_y holds labels {int(self.used[0])}..{int(self.used[-1])}, but the model has {classes} "
                f"outputs. Relabel the episode to 0..{classes - 1}, or give the model more outputs. A label that the "
                "loss ignores is known from torch's own loss alone: partial(F.cross_entropy, ignore_index=...)."
            )
        unused = torch.ones(classes, dtype=torch.bool, device=prediction.device)
        unused[self.used] = False
        return unused.view(1, -1, *(1,) * (prediction.ndim - 2))

    def _sums_to_one(self, prediction: Tensor) -> bool:
        """Whether the prediction is log-probabilities, whatever the loss."""
        off = prediction.logsumexp(1).abs() > torch.finfo(prediction.dtype).eps ** 0.5
        if class_loss(self.loss_fn) is F.nll_loss and bool(off.any()):
            raise TaskError(
                "mask_unused_outputs=True with nll_loss needs log-probabilities, but the probabilities of the model's "
                "outputs do not sum to one. End the model with log_softmax, or use F.cross_entropy, which takes logits."
            )
        return not bool(off.any())

    def _check(
        self, value: Tensor, plain: Tensor, masked: Tensor, unused: Tensor, y: Any, around: Callable[[Tensor], Any]
    ) -> None:
        kept = masked[:, self.used]
        if not kept.numel() or not bool(unused.any()) or not bool(kept.isfinite().all()):
            return
        generators = Generators(plain.device)
        # A loss that is a module may count its calls.
        loss = copy.deepcopy(self.loss_fn) if isinstance(self.loss_fn, nn.Module) else self.loss_fn

        def tried(prediction: Tensor) -> Tensor:
            try:
                found: Tensor = loss(prediction_for(self.loss_fn, around(prediction)), y)
                return found
            finally:
                generators.put_back()

        if not bool(value.isfinite()):
            if bool(tried(plain).isfinite()):
                raise MaskRefusedError(
                    "mask_unused_outputs=True: the loss is not finite, because it asks masked outputs for a "
                    f"probability, as label smoothing and binary cross-entropy do. {_OTHERWISE}"
                )
            return
        usual, made_to_sum = tried(masked), not torch.equal(kept, plain[:, self.used])
        if not made_to_sum and torch.equal(tried(masked.masked_fill(unused, kept.max())), usual):
            raise MaskRefusedError(
                "mask_unused_outputs=True has no effect on the loss, which looks at the label's own output alone. "
                f"{_OTHERWISE}"
            )
        try:
            longer = tried(torch.cat([masked, torch.full_like(masked[:, :1], -torch.inf)], 1))
        except torch.OutOfMemoryError:
            raise
        except Exception as error:
            raise MaskRefusedError(
                "mask_unused_outputs=True: the loss takes this number of outputs alone "
                f"({type(error).__name__}: {first_line(error)}), so masked ones may count in it. {_OTHERWISE}"
            ) from error
        if not torch.allclose(longer, usual, rtol=torch.finfo(usual.dtype).eps ** 0.5):
            raise MaskRefusedError(
                "mask_unused_outputs=True: the loss depends on how many outputs are masked, as a mean over all outputs "
                f"does. {_OTHERWISE}"
            )


_OTHERWISE = (
    "Use F.cross_entropy on logits or F.nll_loss on log-probabilities, without label smoothing, or leave it False and "
    "select the task's outputs in loss_fn."
)
