"""Neural statistician: a set of examples -> a Gaussian over its context -> a generative model of the set."""

from __future__ import annotations

import math
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.modules.lazy import LazyModuleMixin
from torch.nn.parameter import UninitializedParameter
from typing_extensions import Unpack

from metawrap.checks.first_look import FirstLook
from metawrap.engines.calling import autograd
from metawrap.errors import ArgumentError, TaskError
from metawrap.heads.fitted import FittedHead, class_means
from metawrap.learner.embedding_learner import EmbeddingKeywords, EmbeddingLearner
from metawrap.results import ignored_label
from metawrap.settings.keywords import checked
from metawrap.settings.validated import Count, NotNegative
from metawrap.tasks import Inputs, Task, describe_value

Likelihood = Literal["bernoulli", "gaussian"]

# Bound of a log-variance, on both sides.
LARGEST = 5.0


class Gaussian(NamedTuple):
    """A Gaussian with a diagonal covariance; both (..., numbers)."""

    mean: Tensor
    log_variance: Tensor

    def drawn(self, random: bool) -> Tensor:
        """A differentiable draw, or the mean."""
        return self.mean + torch.randn_like(self.mean) * (self.log_variance / 2).exp() if random else self.mean


def divergence(one: Gaussian, other: Gaussian) -> Tensor:
    """KL(one || other), summed over the last axis; the others are broadcast."""
    gap = (one.mean - other.mean).square() / other.log_variance.exp()
    ratio = one.log_variance - other.log_variance
    return (gap + ratio.exp() - ratio - 1).sum(-1) / 2


class NeuralStatistician(EmbeddingLearner):
    """The neural statistician: a class is a set of examples, and its statistic a Gaussian q(c|D) over a context c.

    A set's generative model: c ~ N(0, 1); for each example a latent z ~ p(z|c), and the example itself ~ p(x|z, c).
    Trained to raise the variational bound of each class of a task, whose set D is its support and targets together:

        E_q(c|D) [ sum_x E_q(z|x,c) log p(x|z,c) - KL(q(z|x,c) || p(z|c)) ] - KL(q(c|D) || p(c))

    with one draw of c and z; the loss is minus the sum over the classes, per example. q(c|D) takes the mean over the
    set of a layer on the embeddings, and q(z|x,c) the embedding of x. A target x is of the class i with the smallest
    KL(q(c|D_i) || q(c|x)), D_i its support set: the prediction is minus that. Labels only group the examples into sets.
    In evaluation nothing is drawn: the loss is taken at the means.

    Differs from the paper: one stochastic layer z, as in its Omniglot experiment; the decoder is an MLP without norms,
    so that no target depends on the others; log-variances are 5 tanh(v / 5) of a network's output v.

    Args:
        model: takes one floating-point tensor.
        context, latent, hidden: sizes of c, of z, and of the hidden layers.
        likelihood: p(x|z,c) of each number of an input: "bernoulli", for inputs in 0..1; "gaussian", whose variance is
            learned for each number; "auto" is bernoulli if the first task's support inputs are all in 0..1.
        discriminative: weight of loss_fn on the prediction, added to the loss; the paper has none.
        keywords: see `EmbeddingKeywords` and `OuterKeywords`; loss_fn only with a `discriminative` weight.

    >>> learner = NeuralStatistician(nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3)), context=8, hidden=32)
    >>> adapted = learner.adapt(torch.randn(6, 4), torch.arange(6) % 3)

    Source: Edwards, Storkey 2017, arXiv:1606.02185, Eq. 5 to 8 (one layer), section 4.3 and its few-shot algorithm.
    """

    statistician: Statistician

    @checked
    def __init__(
        self,
        model: nn.Module,
        *,
        context: Count = 64,
        latent: Count = 16,
        hidden: Count = 256,
        likelihood: Literal["auto", "bernoulli", "gaussian"] = "auto",
        discriminative: NotNegative = 0.0,
        **keywords: Unpack[EmbeddingKeywords],
    ) -> None:
        if "loss_fn" in keywords and not discriminative:
            raise ArgumentError(
                "loss_fn: has no effect on NeuralStatistician, which is trained by its variational bound. Leave it "
                "out, or give it a weight with discriminative=."
            )
        parts = {"statistician": Statistician(context, latent, hidden)}
        super().__init__(model, keywords, options=self.own, parts=parts)
        self.discriminative = discriminative
        self._likelihood: Likelihood | None = None if likelihood == "auto" else likelihood

    def _fit_head(self, support: Tensor, labels: Tensor, ways: int) -> FittedHead:
        return NearestContext(self.statistician.statistic(support, labels, ways), self.statistician.statistic)

    def _predict(self, task: Task, support: Tensor, labels: Tensor, ways: int, target: Tensor) -> tuple[Tensor, Tensor]:
        shown = task.target_y != ignored_label(self.loss_fn)
        inputs = torch.cat([self._numbers(task.support_x), self._numbers(task.target_x)[shown]])
        members = torch.cat([labels, task.target_y[shown].long()])
        embeddings = torch.cat([support, target[shown]])
        binary = self._likelihood == "bernoulli"
        bound = self.statistician(inputs, embeddings, members, ways, binary, random=self.training)
        loss = -bound.sum() / len(members)
        with autograd(torch.is_grad_enabled() and self.discriminative > 0):
            prediction = self._fit_head(support, labels, ways)(target)
        if self.discriminative:
            loss = loss + self.discriminative * self._loss(prediction, task.target_y, "target")
        return prediction, loss

    def _numbers(self, inputs: Inputs) -> Tensor:
        """The inputs as vectors; raises TaskError where they are not one floating-point tensor."""
        if not isinstance(inputs, Tensor) or not inputs.is_floating_point():
            raise TaskError(
                "NeuralStatistician models the network's input, which must be one floating-point tensor, but got "
                f"{describe_value(inputs)}. Convert it, or use another method."
            )
        if self._likelihood == "bernoulli" and not _in_unit_range(inputs):
            raise TaskError(
                f"likelihood: 'bernoulli' needs inputs in 0..1, but these are in {float(inputs.min()):.4g}.."
                f"{float(inputs.max()):.4g}. Scale them, or pass likelihood='gaussian'."
            )
        return inputs.flatten(1)

    def _inspect(self, task: Task) -> FirstLook:
        before = self._likelihood
        try:
            if before is None:
                inputs = self._numbers(task.support_x)
                self._likelihood = "bernoulli" if _in_unit_range(inputs) else "gaussian"
            return super()._inspect(task)
        except BaseException:
            self._likelihood = before
            raise

    def get_extra_state(self) -> dict[str, Any]:
        """The counters, the head's name and the likelihood, for state_dict."""
        return super().get_extra_state() | {"likelihood": self._likelihood}

    def set_extra_state(self, state: dict[str, Any]) -> None:
        """Restores them; the head's name and the likelihood where this learner has none yet.

        Raises:
            ArgumentError: the stored likelihood is another one than this learner's.
        """
        stored = state.get("likelihood")
        if stored and self._likelihood and stored != self._likelihood:
            raise ArgumentError(
                f"likelihood: the stored state is of {stored!r}, but this learner of {self._likelihood!r}. Build it "
                f"with likelihood={stored!r}."
            )
        super().set_extra_state(state)
        self._likelihood = self._likelihood or stored


class NearestContext(FittedHead):
    """Logits are minus KL(q(c|class) || q(c|target)). mean, log_variance: (ways, context)."""

    mean: Tensor
    log_variance: Tensor

    def __init__(self, contexts: Gaussian, statistic: Statistic) -> None:
        super().__init__(**contexts._asdict())
        self.statistic = statistic

    def forward(self, embeddings: Tensor) -> Tensor:
        """(targets, numbers) to (targets, ways)."""
        alone = self.statistic.of_each(embeddings)
        targets = Gaussian(alone.mean[:, None], alone.log_variance[:, None])
        return -divergence(Gaussian(self.mean, self.log_variance), targets)


class Statistic(nn.Module):
    """q(c|D), the statistic network: embeddings -> a layer -> the mean over the set -> a Gaussian."""

    def __init__(self, context: int, hidden: int) -> None:
        super().__init__()
        self.before = nn.Sequential(nn.LazyLinear(hidden), nn.ELU())
        self.behind = nn.Sequential(nn.Linear(hidden, hidden), nn.ELU(), nn.Linear(hidden, 2 * context))

    def forward(self, embeddings: Tensor, labels: Tensor, ways: int) -> Gaussian:
        """Embeddings (examples, numbers), labels (examples,) to one Gaussian for each class, (ways, context)."""
        return _gaussian(self.behind(class_means(self.before(embeddings), labels, ways)))

    def of_each(self, embeddings: Tensor) -> Gaussian:
        """The same with each example as a set of its own: (examples, context)."""
        return _gaussian(self.behind(self.before(embeddings)))


class Statistician(nn.Module):
    """The generative model of a set, and its approximate posterior."""

    def __init__(self, context: int, latent: int, hidden: int) -> None:
        super().__init__()
        self.statistic = Statistic(context, hidden)
        self.posterior = nn.Sequential(nn.LazyLinear(hidden), nn.ELU(), nn.Linear(hidden, 2 * latent))
        self.prior = nn.Sequential(nn.Linear(context, hidden), nn.ELU(), nn.Linear(hidden, 2 * latent))
        self.decoder = nn.Sequential(nn.Linear(latent + context, hidden), nn.ELU(), nn.Linear(hidden, hidden), nn.ELU())
        self.observed = Observed(hidden)

    def forward(
        self, inputs: Tensor, embeddings: Tensor, labels: Tensor, ways: int, binary: bool, random: bool
    ) -> Tensor:
        """The variational bound of each class, (ways,), in nats; random: with draws of c and z, not their means."""
        contexts = self.statistic(embeddings, labels, ways)
        c = contexts.drawn(random)
        prior, own = _gaussian(self.prior(c)), c[labels]
        latents = _gaussian(self.posterior(torch.cat([embeddings, own], 1)))
        z = latents.drawn(random)
        fit: Tensor = self.observed(self.decoder(torch.cat([z, own], 1)), inputs, binary)
        each = fit - divergence(latents, Gaussian(prior.mean[labels], prior.log_variance[labels]))
        nothing = torch.zeros_like(contexts.mean)
        return each.new_zeros(ways).index_add(0, labels, each) - divergence(contexts, Gaussian(nothing, nothing))


class Observed(LazyModuleMixin, nn.Module):
    """log p(x|z, c): the last layer of the decoder. weight: (numbers, hidden), sized by the first inputs.

    log_variance: (numbers,), or empty where numbers are binary.
    """

    weight: UninitializedParameter
    bias: UninitializedParameter
    log_variance: UninitializedParameter

    def __init__(self, hidden: int) -> None:
        super().__init__()
        self.hidden = hidden
        self.weight, self.bias = UninitializedParameter(), UninitializedParameter()
        self.log_variance = UninitializedParameter()

    def initialize_parameters(self, decoded: Tensor, inputs: Tensor, binary: bool) -> None:
        """Gives the layer its size, and draws its weight as `nn.Linear` does."""
        if self.has_uninitialized_params():
            numbers = inputs.shape[1]
            with torch.no_grad():
                self.weight.materialize((numbers, self.hidden))
                self.bias.materialize((numbers,))
                self.log_variance.materialize((0 if binary else numbers,))
                nn.init.kaiming_uniform_(self.weight, a=5**0.5)
                nn.init.zeros_(self.bias)
                nn.init.zeros_(self.log_variance)

    def forward(self, decoded: Tensor, inputs: Tensor, binary: bool) -> Tensor:
        """(examples, hidden) and the inputs, (examples, numbers), to their log-likelihood, (examples,)."""
        if inputs.shape[1] != len(self.weight):
            raise TaskError(
                f"NeuralStatistician: its decoder makes inputs of {len(self.weight)} numbers, as the first ones were, "
                f"but these have {inputs.shape[1]}. Make all inputs of one size."
            )
        made = F.linear(decoded, self.weight, self.bias)
        inputs = inputs.to(made.dtype)
        if binary:
            return -F.binary_cross_entropy_with_logits(made, inputs, reduction="none").sum(1)
        log_variance = _bounded(self.log_variance)
        each = (inputs - made).square() / log_variance.exp() + log_variance + math.log(2 * math.pi)
        return -each.sum(1) / 2


def _gaussian(numbers: Tensor) -> Gaussian:
    mean, log_variance = numbers.chunk(2, -1)
    return Gaussian(mean, _bounded(log_variance))


def _bounded(log_variance: Tensor) -> Tensor:
    # Without bounds, the divergence of two narrow Gaussians that are far apart overflows.
    return LARGEST * (log_variance / LARGEST).tanh()


def _in_unit_range(inputs: Tensor) -> bool:
    return bool(((inputs >= 0) & (inputs <= 1)).all())
