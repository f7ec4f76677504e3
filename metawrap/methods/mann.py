"""MANN: an LSTM takes in the support set, one example after the other, with a memory beside it; then each target."""

from __future__ import annotations

from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn
from typing_extensions import Unpack

from metawrap.errors import ArgumentError
from metawrap.heads.class_rows import ClassRows
from metawrap.heads.fitted import FittedHead, one_hot
from metawrap.learner.embedding_learner import EmbeddingKeywords, EmbeddingLearner
from metawrap.settings.keywords import checked
from metawrap.settings.validated import Count, Positive, Several, Share, Switch
from metawrap.tasks import Task

Order = Literal["sorted", "given", "shuffled"]


class MANN(EmbeddingLearner):
    """Memory-augmented neural network: an LSTM controller, and a memory written where it was least recently used.

    A task is a sequence, in which a label comes one step late: the input at step t is the embedding of x_t with the
    one-hot label y_{t-1}, zeros at first. With h_t the LSTM's output, each of the n read heads has a key
    k_t = tanh(W_k h_t) and does, with M the memory of `slots` rows of `width` numbers,

    - read: w^r_t = softmax(beta cos(k_t, M_{t-1})), r_t = w^r_t M_{t-1}
    - write: w^w_t = sigma(alpha) w^r_{t-1} + (1 - sigma(alpha)) w^lu_{t-1}; the rows of w^lu_{t-1} are set to zero,
      then M_t(i) = M_{t-1}(i) + w^w_t(i) k_t
    - usage: w^u_t = gamma w^u_{t-1} + w^r_t + w^w_t; w^lu_t is 1 at the n least used rows, one for each head, else 0.

    (h_t, r_t) gives the logits, and r_t is an input of the LSTM at t + 1. The support set goes first; then each target
    is the next input, after the same support set and its last label: targets know nothing of each other. The loss is
    on the targets.

    As in the paper: controller, addressing, labels, sizes and n = 4. Different, or open in the paper: embeddings enter,
    not pixels; a step reads before it writes, so that it does not find its own key; alpha is one learned number for
    each head; beta, as in the neural Turing machine, makes reading sharp, where the paper's 1 spreads it evenly over
    the rows and needs about a hundred thousand episodes; the support set is sorted by class, so that the result does
    not depend on the order of the classes.

    Args:
        ways: the most classes that a task may have; None is the number in the first task.
        hidden: units of the LSTM.
        slots, width: rows of the memory, at least as many as `reads`, and numbers in each.
        reads: n, the heads.
        decay: gamma, from 0 to 1.
        key_strength: beta.
        order: of the support set: "sorted" by class, as "given", or "shuffled" in training (from torch's global
            generator, as in the paper) and as given elsewhere.
        support_loss: add the loss of the predictions for support examples before their labels, as in the paper.
        keywords: see `EmbeddingKeywords` and `OuterKeywords`.

    >>> learner = MANN(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), ways=3, hidden=32)
    >>> adapted = learner.adapt(torch.randn(6, 4), torch.arange(6) % 3)

    Source: Santoro, Bartunov, Botvinick, Wierstra, Lillicrap 2016, arXiv:1605.06065, Section 3 and Eq. 2 to 8; beta is
    from Graves, Wayne, Danihelka 2014, arXiv:1410.5401, Eq. 5.
    """

    controller: Controller
    rows: ClassRows

    @checked
    def __init__(
        self,
        model: nn.Module,
        *,
        ways: Several | None = None,
        hidden: Count = 200,
        slots: Count = 128,
        width: Count = 40,
        reads: Count = 4,
        decay: Share = 0.95,
        key_strength: Positive = 10.0,
        order: Order = "sorted",
        support_loss: Switch = False,
        **keywords: Unpack[EmbeddingKeywords],
    ) -> None:
        if slots < reads:
            raise ArgumentError(f"slots: expected at least one for each of {reads} reads, but got {slots}.")
        controller = Controller(hidden, slots, width, reads, decay, key_strength)
        super().__init__(model, keywords, options=self.own, parts={"controller": controller, "rows": ClassRows(ways)})
        self.order: Order = order
        self.support_loss = support_loss

    def _fit_head(self, support: Tensor, labels: Tensor, ways: int) -> AfterSupport:
        return self._presented(support, labels, ways)[0]

    def _predict(self, task: Task, support: Tensor, labels: Tensor, ways: int, target: Tensor) -> tuple[Tensor, Tensor]:
        head, guesses, order = self._presented(support, labels, ways)
        prediction = head(target)
        loss = self._loss(prediction, task.target_y, "target")
        if self.support_loss:
            loss = loss + self._loss(guesses, labels[order], "support")
        return prediction, loss

    def _presented(self, support: Tensor, labels: Tensor, ways: int) -> tuple[AfterSupport, Tensor, Tensor]:
        """The head after the support set, the logits for each support example before its label, and their order."""
        self.rows.check_ways(ways, type(self).__name__)
        controller, order = self.controller, self._order_of(labels)
        rows = self.rows(ways, controller.outputs)
        assert self.rows.most is not None
        told = one_hot(labels[order], self.rows.most, support)
        late = torch.cat([torch.zeros_like(told[:1]), told])
        state, outputs = controller.start(support), []
        for embedding, label in zip(support[order][:, None], late[:-1, None], strict=True):
            output, keys, state = controller(embedding, label, state)
            state = controller.written(state, keys)
            outputs.append(output)
        return AfterSupport(controller, rows, late[-1:], state), torch.cat(outputs) @ rows.T, order

    def _order_of(self, labels: Tensor) -> Tensor:
        if self.order == "sorted":
            return labels.argsort(stable=True)
        if self.order == "shuffled" and self.training:
            return torch.randperm(len(labels)).to(labels.device)
        return torch.arange(len(labels), device=labels.device)


class ControllerState(NamedTuple):
    """The state between two steps; the batch is one sequence, or one for each target.

    hidden, cell: (batch, hidden). memory: (batch, slots, width). read: (batch, reads, width), r.
    read_weights: (batch, reads, slots), w^r; last_weights: those of the step before. usage: (batch, slots).
    """

    hidden: Tensor
    cell: Tensor
    memory: Tensor
    read: Tensor
    read_weights: Tensor
    last_weights: Tensor
    usage: Tensor


class Controller(nn.Module):
    """The LSTM with its heads. outputs: how many numbers a step gives, (h_t, r_t)."""

    def __init__(self, hidden: int, slots: int, width: int, reads: int, decay: float, key_strength: float) -> None:
        super().__init__()
        self.slots, self.width, self.reads = slots, width, reads
        self.decay, self.key_strength = decay, key_strength
        self.hidden, self.outputs = hidden, hidden + reads * width
        self.embedding = nn.LazyLinear(4 * hidden)
        self.label = nn.LazyLinear(4 * hidden, bias=False)
        self.state = nn.Linear(self.outputs, 4 * hidden, bias=False)
        self.key = nn.Linear(hidden, reads * width)
        # At first nearly all is written to unused rows; at 0, half of each write would go to the rows that were read.
        self.alpha = nn.Parameter(torch.full((reads, 1), -3.0))

    def start(self, like: Tensor) -> ControllerState:
        """An empty memory and a controller at rest."""
        weights = like.new_zeros(1, self.reads, self.slots)
        return ControllerState(
            hidden=like.new_zeros(1, self.hidden),
            cell=like.new_zeros(1, self.hidden),
            memory=like.new_zeros(1, self.slots, self.width),
            read=like.new_zeros(1, self.reads, self.width),
            read_weights=weights,
            last_weights=weights,
            usage=like.new_zeros(1, self.slots),
        )

    def forward(
        self, embeddings: Tensor, label: Tensor, state: ControllerState
    ) -> tuple[Tensor, Tensor, ControllerState]:
        """One step without its write: output (batch, outputs), keys (batch, reads, width), and the state.

        embeddings: (batch, numbers). label: (1, ways). state: of one sequence.
        """
        before = torch.cat([state.hidden, state.read.flatten(1)], dim=1)
        gates = self.embedding(embeddings) + self.label(label) + self.state(before)
        take, forget, give, new = gates.chunk(4, dim=1)
        # The forget gate starts open, so that the first examples are remembered.
        cell = torch.sigmoid(forget + 1) * state.cell + torch.sigmoid(take) * torch.tanh(new)
        hidden = torch.sigmoid(give) * torch.tanh(cell)
        keys = torch.tanh(self.key(hidden)).view(-1, self.reads, self.width)
        weights = torch.softmax(self.key_strength * slot_cosines(keys, state.memory), dim=-1)
        state = state._replace(
            hidden=hidden, cell=cell, read=weights @ state.memory, read_weights=weights, last_weights=state.read_weights
        )
        return torch.cat([hidden, state.read.flatten(1)], dim=1), keys, state

    def written(self, state: ControllerState, keys: Tensor) -> ControllerState:
        """The state after the step's write."""
        gate, unused = torch.sigmoid(self.alpha), least_used(state.usage, self.reads)
        write = gate * state.last_weights + (1 - gate) * unused
        return state._replace(
            memory=state.memory * (1 - unused.sum(1))[..., None] + write.mT @ keys,
            usage=self.decay * state.usage + state.read_weights.sum(1) + write.sum(1),
        )


def least_used(usage: Tensor, heads: int) -> Tensor:
    """w^lu, a row for each head: 1 at the least used slot in the first, at the next in the second, and so on.

    usage: (batch, slots). Returns (batch, heads, slots).
    """
    chosen = usage.argsort(dim=1, stable=True)[:, :heads]
    return nn.functional.one_hot(chosen, usage.shape[1]).to(usage.dtype)


def slot_cosines(keys: Tensor, memory: Tensor) -> Tensor:
    """Cosines of (..., keys, numbers) with (..., slots, numbers), shape (..., keys, slots); 0 for an empty slot."""
    # The floor bounds the gradient of a slot that is nearly empty.
    one, other = (nn.functional.normalize(each, dim=-1, eps=1e-6) for each in (keys, memory))
    return one @ other.mT


class AfterSupport(FittedHead):
    """The controller and its state after the support set.

    rows: (ways, outputs), of the output layer. label: (1, most ways), of the last example. state: of one sequence.
    """

    rows: Tensor
    label: Tensor

    def __init__(self, controller: Controller, rows: Tensor, label: Tensor, state: ControllerState) -> None:
        super().__init__(rows=rows, label=label, **state._asdict())
        self.controller = controller

    def forward(self, embeddings: Tensor) -> Tensor:
        """(targets, numbers) to (targets, ways)."""
        state = ControllerState(**{name: self.get_buffer(name) for name in ControllerState._fields})
        output, _, _ = self.controller(embeddings, self.label, state)
        return output @ self.rows.T  # type: ignore[no-any-return]
