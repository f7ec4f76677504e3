"""MANN: an LSTM reads the support set one step after the other, each with the label of the one before, into a memory."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor, nn

from metawrap.methods.embedding.fitted import FittedHead, one_hot
from metawrap.methods.embedding.memory import PerClass, slot_cosines


class MemoryState(NamedTuple):
    """What the controller carries from step to step; batch is one sequence, or one for each target.

    hidden, cell: (batch, hidden). memory: (batch, slots, width). read: (batch, reads * width), what was read last.
    read_weights: (batch, reads, slots). usage: (batch, slots).
    """

    hidden: Tensor
    cell: Tensor
    memory: Tensor
    read: Tensor
    read_weights: Tensor
    usage: Tensor


def least_used(usage: Tensor, count: int) -> Tensor:
    """w^lu, one row for each write: 1 at the least used slot in the first, at the next in the second, and so on.

    usage: (batch, slots). Returns (batch, count, slots).
    """
    slots = usage.argsort(dim=1, stable=True)[:, :count]
    return nn.functional.one_hot(slots, usage.shape[1]).to(usage.dtype)


def access(state, keys, gate, decay, strength=1.0, mode="write_first"):
    if mode == "read_first" or mode == "mixed":
        unused = least_used(state.usage, keys.shape[1])
        write = gate * state.read_weights + (1 - gate) * unused
        read_weights = torch.softmax(strength * slot_cosines(keys, state.memory), dim=-1)
        memory = state.memory * (1 - unused.sum(1))[..., None] + write.mT @ keys
        read = read_weights @ (state.memory if mode == "read_first" else memory)
        usage = decay * state.usage + read_weights.sum(1) + write.sum(1)
        return state._replace(memory=memory, read=read.flatten(1), read_weights=read_weights, usage=usage)
    unused = least_used(state.usage, keys.shape[1])
    write = gate * state.read_weights + (1 - gate) * unused
    memory = state.memory * (1 - unused.sum(1))[..., None] + write.mT @ keys
    read_weights = torch.softmax(strength * slot_cosines(keys, memory), dim=-1)
    usage = decay * state.usage + read_weights.sum(1) + write.sum(1)
    return state._replace(
        memory=memory, read=(read_weights @ memory).flatten(1), read_weights=read_weights, usage=usage
    )


class Controller(nn.Module):
    def __init__(self, hidden, slots, width, reads, decay, strength, init_gate=0.0, mode="write_first"):
        self_mode = mode
        super().__init__()
        self.mode = self_mode
        self.hidden, self.slots, self.width, self.reads, self.decay, self.strength = (
            hidden,
            slots,
            width,
            reads,
            decay,
            strength,
        )
        self.embedding = nn.LazyLinear(4 * hidden)
        self.label = nn.LazyLinear(4 * hidden, bias=False)
        self.state = nn.Linear(hidden + reads * width, 4 * hidden, bias=False)
        self.key = nn.Linear(hidden, reads * width)
        self.gate = nn.Parameter(torch.full((reads, 1), init_gate))

    def start(self, like):
        n = like.new_zeros
        return MemoryState(
            n(1, self.hidden),
            n(1, self.hidden),
            n(1, self.slots, self.width),
            n(1, self.reads * self.width),
            n(1, self.reads, self.slots),
            n(1, self.slots),
        )

    def forward(self, embeddings, label, state):
        last = torch.cat([state.hidden, state.read], 1)
        gates = self.embedding(embeddings) + self.label(label) + self.state(last)
        i, f, o, u = gates.chunk(4, 1)
        cell = torch.sigmoid(f + 1) * state.cell + torch.sigmoid(i) * torch.tanh(u)
        hidden = torch.sigmoid(o) * torch.tanh(cell)
        keys = torch.tanh(self.key(hidden)).unflatten(1, (self.reads, self.width))
        return access(
            state._replace(hidden=hidden, cell=cell),
            keys,
            torch.sigmoid(self.gate),
            self.decay,
            self.strength,
            self.mode,
        )


class MANN(PerClass):
    def __init__(
        self,
        model,
        *,
        ways=None,
        hidden=200,
        slots=128,
        width=40,
        reads=4,
        decay=0.95,
        strength=1.0,
        init_gate=0.0,
        mode="write_first",
        order="sorted",
        support_loss=False,
        **keywords,
    ):
        parts = {"controller": Controller(hidden, slots, width, reads, decay, strength, init_gate, mode)}
        super().__init__(model, ways, options={}, parts=parts, **keywords)
        self.order = order
        self.support_loss = support_loss

    def _presented(self, support, labels, ways):
        state = self.controller.start(support)
        self.rows(ways, self.controller.hidden + self.controller.reads * self.controller.width)
        most = self.rows.most
        order = torch.arange(len(labels))
        if self.order == "sorted":
            order = labels.argsort(stable=True)
        elif self.order == "shuffled" and self.training:
            order = torch.randperm(len(labels))
        support, labels = support[order], labels[order]
        given = one_hot(labels, most, support)
        label = torch.zeros_like(given[:1])
        outs = []
        for x, y in zip(support.split(1), given.split(1)):
            state = self.controller(x, label, state)
            label = y
            outs.append(torch.cat([state.hidden, state.read], 1))
        return state, label, torch.cat(outs), labels

    def _fitted(self, support, labels, ways):
        state, label, _, _ = self._presented(support, labels, ways)
        return self._hd(ways, state, label)

    def _hd(self, ways, state, label):
        return Asked(self.controller, self.rows(ways, state.hidden.shape[1] + state.read.shape[1]), state, label)

    def _judged(self, support, labels, ways, target, target_y):
        state, label, outs, labels = self._presented(support, labels, ways)
        pred = self._hd(ways, state, label)(target)
        loss = self._loss(pred, target_y, "target")
        if self.support_loss:
            loss = loss + self._loss(outs @ self.rows(ways, 0).T, labels, "support")
        return pred, loss


class Asked(FittedHead):
    def __init__(self, controller, rows, state, label):
        super().__init__()
        self.controller, self.rows, self.state, self.label = controller, rows, state, label

    def forward(self, embeddings):
        state = MemoryState(*(each.expand(len(embeddings), *each.shape[1:]) for each in self.state))
        state = self.controller(embeddings, self.label.expand(len(embeddings), -1), state)
        return torch.cat([state.hidden, state.read], 1) @ self.rows.T
