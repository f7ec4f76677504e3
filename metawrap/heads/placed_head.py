"""A fitted head in the place of the user's own: an ordinary layer, or a head that is pickled as its own code."""

from __future__ import annotations

from typing import Any

from torch import Tensor, fx, nn

from metawrap.heads.embedding import Entering
from metawrap.heads.fitted import FittedHead


def placed(head: nn.Module, entering: Entering, flat: bool) -> nn.Module:
    """What takes the place of the user's head: the linear layer itself where it can, else a `PlacedHead`; in eval mode.

    Args:
        head: takes embeddings, as vectors if `flat`. entering: a call of the user's head.
    """
    if type(head) is nn.Linear and entering.keyword in (None, "input"):
        return head if entering.value.ndim == 2 else nn.Sequential(nn.Flatten(), head).eval()
    return PlacedHead(head, flat, entering.keyword or "input").eval()


class PlacedHead(nn.Module):
    """A fitted head in the place of the user's own: takes one argument, under any name.

    Its pickle is that of a `torch.fx.GraphModule`, which holds the head's code and tensors: to load it needs torch, and
    not metawrap. A head that torch.fx cannot follow, that of `RelationNet`, is pickled as it is.

    flat: whether an embedding of any shape is taken as a vector. keyword: the argument's name in the pickle.
    """

    def __init__(self, head: nn.Module, flat: bool, keyword: str) -> None:
        super().__init__()
        self.head, self.flat, self.keyword = head, flat, keyword

    def forward(self, *args: Tensor, **kwargs: Tensor) -> Tensor:
        """(targets, ...) to (targets, ways)."""
        [embeddings] = (*args, *kwargs.values())
        return self._logits(embeddings)

    def _logits(self, embeddings: Tensor) -> Tensor:
        logits: Tensor = self.head(embeddings.flatten(1) if self.flat else embeddings)
        return logits

    def __reduce_ex__(self, protocol: Any) -> Any:
        if isinstance(self.head, FittedHead) and not self.head.traceable:
            return super().__reduce_ex__(protocol)
        # A tracer of torch's own class: the pickle names the class, and uses it again.
        tracer = fx.Tracer()
        tracer.traced_func_name = "_logits"
        tracer.is_leaf_module = _is_leaf  # type: ignore[method-assign, assignment]
        graph = tracer.trace(self)
        next(node for node in graph.nodes if node.op == "placeholder").target = self.keyword
        return fx.GraphModule(self, graph, "FittedHead").__reduce_ex__(protocol)


def _is_leaf(module: nn.Module, name: str) -> bool:
    """Whether a module is a part of the graph as it is; the code of metawrap's modules is followed."""
    return type(module).__module__.split(".")[0] != "metawrap"
