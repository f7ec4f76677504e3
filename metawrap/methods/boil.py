"""BOIL: MAML whose inner loop adapts every layer but the head."""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any, ClassVar

from torch import nn
from typing_extensions import Unpack

from metawrap.checks.first_task import model_unchanged
from metawrap.engines.calling import autograd
from metawrap.errors import ArgumentError
from metawrap.inner_loop.head_starts import head_parameters
from metawrap.learner.description import Description
from metawrap.learner.keywords import MAMLKeywords
from metawrap.methods.maml import MAML
from metawrap.settings.keywords import shows
from metawrap.surgery.inspect import find_head
from metawrap.tasks import Task, copy_of


class BOIL(MAML):
    """Body Only update in Inner Loop: MAML whose inner loop adapts all but the head, which the outer loop alone learns.

    With f the body at weights v, h the head at weights w, alpha the rate and K the number of steps: v_0 = v;
    v_k = v_(k-1) - alpha * grad_v L(h(f(support; v_(k-1)); w), support_y);
    meta-loss = L(h(f(target; v_K); w), target_y).
    Its gradient flows through every step to v, and to w through every step and the target loss. The opposite of `ANIL`.

    All keywords are those of `MAMLPlusPlus`; `adapt` chooses from all but the head, and the head starts as learned. The
    head is found with the first task if `head` is None. As in the paper: the head's inner rate is zero. Different: the
    authors' code takes one inner step with rate 0.5, and adapts the scale and shift of batch norms, which
    adapt_norm=True does here. Source: Oh, Yoo, Kim, Yun 2021, arXiv:2008.08882.

    Raises:
        ArgumentError, UnsupportedModuleError: as `MAMLPlusPlus` does; or the head is not known for sure, shares an
            adapted parameter with the body, or is all that is adapted.

    >>> learner = BOIL(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), head="2")
    >>> list(learner.describe().adapted)
    ['0.weight', '0.bias']
    """

    fixed: ClassVar[Mapping[str, Any]] = {"outputs.head_init": "learned"}

    @shows(MAMLKeywords)
    def __init__(self, model: nn.Module, **keywords: Unpack[MAMLKeywords]) -> None:
        self._build(model, keywords, MAMLKeywords)
        if self.head is not None:
            self._leave_out(self.head)

    def _prepare(self, task: Task) -> None:
        if self.head is None:
            with autograd(False), model_unchanged(self, self.checks.edits):
                found = find_head(self.model, partial(self.wrapped.run, task.map(copy_of).support_x, "batch"))
            self._leave_out(found.name if found.exact else None)
        super()._prepare(task)

    def _leave_out(self, head: str | None) -> None:
        """Takes the head's parameters out of the inner loop; their rates stay in state_dict, unused."""
        names = head_parameters("BOIL", self.model, head, self.wrapped.adapted)
        rest = tuple(name for name in self.wrapped.adapted if name not in names)
        if not rest:
            raise ArgumentError(
                f"BOIL adapts all but the head, but nothing is adapted besides the head '{head}'. Unfreeze more, name "
                "more in adapt=, name another head with head=, or use ANIL, which adapts the head."
            )
        self.head, self.wrapped.adapted = head, rest
        self.learning_rates.leave_out(names)

    def describe(self) -> Description:
        """What wrapping found and did."""
        described = super().describe()
        if self.head is None:
            described.notes.insert(0, "the head will not be adapted; it is found with the first task")
        return described
