"""The user's own head: which parameters it has, by name, and whether gradient steps can fit it."""

from __future__ import annotations

from typing import ClassVar

from metawrap.errors import UnsupportedModuleError
from metawrap.heads.embedding import Embedding
from metawrap.layers.per_step_norm import PerStepNorm
from metawrap.surgery.swap import parameter_slots
from metawrap.tasks import Inputs


class OwnHead(Embedding):
    """The user's head, kept in its place and fitted to a support set by gradient steps."""

    keeps_head: ClassVar[bool] = True

    def names(self, *, frozen: bool = False) -> dict[str, str]:
        """The name in the network of each of the head's parameters, by its name in the head.

        frozen: whether frozen parameters are among them.
        """
        full = {id(parameter): name for name, parameter in self.model.named_parameters()}
        return {local: full[id(p)] for local, p in self.module.named_parameters() if frozen or p.requires_grad}

    def check_parameters(self) -> None:
        """Raises UnsupportedModuleError when all of the head is frozen, or when it shares a parameter with the body."""
        owner = self.module
        if not self.names():
            raise UnsupportedModuleError(
                f"The head '{self.head}' ({type(owner).__name__}) has no parameters that are not frozen, so "
                f"{self.method} has nothing to fit. Unfreeze it, or name another module with head=."
            )
        inside, slots = {id(module) for module in owner.modules()}, parameter_slots(self.model)
        for name in self.names(frozen=True).values():
            others = [f"{type(m).__name__}.{local}" for m, local in slots[name] if id(m) not in inside]
            if others:
                raise UnsupportedModuleError(
                    f"The head '{self.head}' shares '{name}' with {', '.join(others)}, which must not be fitted with "
                    "it. Give the head a parameter of its own."
                )

    def check_runs_alone(self, inputs: Inputs, examples: int) -> None:
        """Raises UnsupportedModuleError when the head cannot be run on embeddings, apart from the network."""
        if norms := [name for name, m in self.module.named_modules() if isinstance(m, PerStepNorm)]:
            raise UnsupportedModuleError(
                f"The head '{self.head}' holds the batch norm '{norms[0]}', which would normalise at every inner step "
                "by other statistics. Name the module behind it with head=, or leave it alone with "
                f'wrapping={{"keep_norm": ["{norms[0]}"]}}.'
            )
        self.check(inputs)
        self.check_rows(self.of(inputs, "batch"), examples)
