"""Matching networks: each target attends to the support examples -> the attention that each class gets -> its log."""

from __future__ import annotations

import math
from typing import cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter
from typing_extensions import Unpack

from metawrap.errors import ArgumentError
from metawrap.heads.fitted import FittedHead, cosine_similarities
from metawrap.learner.embedding_learner import EmbeddingKeywords, EmbeddingLearner
from metawrap.settings.keywords import checked
from metawrap.settings.validated import Count, Positive, Switch

_STEPS = 5


class MatchingNet(EmbeddingLearner):
    """Matching networks: the probability of a class is the attention that a target pays to its support examples.

    P(y | x) = sum over i of a(x, x_i) [y_i = y],  a = softmax over i of scale * cosine(f(x), g(x_i)).

    Predictions are log-probabilities, (targets, ways), so that cross-entropy is the negative log-likelihood. Without
    full context f and g are the user's network. With it (the paper's fully conditional embedding), f' and g' being the
    user's network, and results depending on the order of the support set:

    - g: the support set, in its order, through a bidirectional LSTM: g(x_i) = forward_i + backward_i + g'(x_i).
    - f: h_k = LSTM(f'(x), [h_{k-1}, r_{k-1}], c_{k-1}) + f'(x), with the read-out r_k = sum over i of
      softmax_i(h_k . g(x_i)) g(x_i), from h_0 = c_0 = 0; f(x) = h_K after K = processing_steps, open in the paper.

    Args:
        full_context: whether f and g see the whole support set.
        processing_steps: K of the full context; 5 if None.
        scale: of the cosines, 1 in the paper. Cosines lie in -1..1, so that at a scale of 1 two probabilities differ by
            a factor of e^2 at most; a greater scale learns faster.
        learn_scale: whether the scale is learned, through its logarithm; in the paper it is not.
        keywords: see `EmbeddingKeywords` and `OuterKeywords`.

    >>> learner = MatchingNet(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), scale=10.0)
    >>> adapted = learner.adapt(torch.randn(6, 4), torch.arange(6) % 3)

    Source: Vinyals, Blundell, Lillicrap, Kavukcuoglu, Wierstra 2016, arXiv:1606.04080, Eq. 1 and 2, Appendix A.
    """

    log_scale: nn.Parameter
    forwards: nn.LSTMCell
    backwards: nn.LSTMCell
    reader: nn.LSTMCell

    @checked
    def __init__(
        self,
        model: nn.Module,
        *,
        full_context: Switch = False,
        processing_steps: Count | None = None,
        scale: Positive = 1.0,
        learn_scale: Switch = False,
        **keywords: Unpack[EmbeddingKeywords],
    ) -> None:
        if processing_steps is not None and not full_context:
            raise ArgumentError("processing_steps: has no effect without full_context=True. Leave it out.")
        steps = _STEPS if processing_steps is None else processing_steps
        options = {"full_context": full_context, "scale": scale, "learn_scale": learn_scale}
        parts: dict[str, nn.Module | nn.Parameter] = {}
        if learn_scale:
            parts["log_scale"] = nn.Parameter(torch.tensor(math.log(scale), dtype=torch.float64))
        if full_context:
            options["processing_steps"] = steps
            parts |= {"forwards": _LazyLSTMCell(1), "backwards": _LazyLSTMCell(1), "reader": _LazyLSTMCell(2)}
        super().__init__(model, keywords, options=options, parts=parts)
        self.full_context, self.processing_steps = full_context, steps
        self.scale, self.learn_scale = float(scale), learn_scale

    def _fit_head(self, support: Tensor, labels: Tensor, ways: int) -> FittedHead:
        scale = self.log_scale.exp() if self.learn_scale else support.new_tensor(self.scale)
        if not self.full_context:
            return Attention(support, labels, ways, scale)
        context = _scanned(self.forwards, support) + _scanned(self.backwards, support.flip(0)).flip(0) + support
        return Attention(context, labels, ways, scale, self.reader, self.processing_steps)


class Attention(FittedHead):
    """Log-probabilities: the log of the attention that goes to each class.

    support: (examples, numbers); labels: (examples,); scale: of the cosines. reader: reads the support set
    `processing_steps` times for each target before the comparison; None compares the target as it is.
    """

    support: Tensor
    labels: Tensor
    scale: Tensor

    def __init__(
        self,
        support: Tensor,
        labels: Tensor,
        ways: int,
        scale: Tensor,
        reader: nn.LSTMCell | None = None,
        processing_steps: int = 0,
    ) -> None:
        super().__init__(support=support, labels=labels, scale=scale)
        self.ways, self.processing_steps, self.reader = ways, processing_steps, reader

    def forward(self, embeddings: Tensor) -> Tensor:
        """(targets, numbers) to (targets, ways)."""
        attended = embeddings if self.reader is None else self._read(embeddings, self.reader)
        attention = F.log_softmax(self.scale * cosine_similarities(attended, self.support), 1)
        classes = torch.arange(self.ways, device=self.labels.device)
        others = self.labels != classes[:, None]
        return attention[:, None].masked_fill(others, -torch.inf).logsumexp(2)

    def _read(self, embeddings: Tensor, reader: nn.LSTMCell) -> Tensor:
        hidden, cell = torch.zeros_like(embeddings), torch.zeros_like(embeddings)
        for _ in range(self.processing_steps):
            read = F.softmax(hidden @ self.support.T, 1) @ self.support
            # One matrix on [f', r] and one on h are one matrix on f' and one on [h, r].
            output, cell = reader(torch.cat([embeddings, read], 1), (hidden, cell))
            hidden = output + embeddings
        return hidden


def _scanned(cell: nn.LSTMCell, rows: Tensor) -> Tensor:
    """The outputs of an LSTM for a sequence: (rows, numbers) to (rows, numbers)."""
    state = (rows.new_zeros(1, rows.shape[1]), rows.new_zeros(1, rows.shape[1]))
    outputs = []
    for row in rows[:, None]:
        state = cell(row, state)
        outputs.append(state[0])
    return torch.cat(outputs)


class _LazyLSTMCell(LazyModuleMixin, nn.LSTMCell):
    """An LSTM cell that takes its sizes from its first input, which is `times` as wide as its output."""

    cls_to_become = nn.LSTMCell

    def __init__(self, times: int) -> None:
        super().__init__(0, 0)
        self.times = times
        for name in list(self._parameters):
            setattr(self, name, UninitializedParameter())

    def initialize_parameters(self, inputs: Tensor, state: tuple[Tensor, Tensor]) -> None:
        """Makes the parameters, unless loading a state_dict has made them."""
        self.input_size, self.hidden_size = inputs.shape[1], inputs.shape[1] // self.times
        if self.has_uninitialized_params():
            gates = 4 * self.hidden_size
            shapes = {"weight_ih": (gates, self.input_size), "weight_hh": (gates, self.hidden_size)}
            for name, parameter in self._parameters.items():
                cast(UninitializedParameter, parameter).materialize(shapes.get(name, (gates,)))
            self.reset_parameters()

    def reset_parameters(self) -> None:
        """As in torch, once the parameters have a size."""
        if self.hidden_size:
            super().reset_parameters()
