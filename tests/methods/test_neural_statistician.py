"""NeuralStatistician: divergences against torch.distributions, bound and classification against numpy by hand."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from face import fingerprint
from keywords import grouped
from method_cases import MapNet, numbers, step, uneven
from models import NormedMlp, TwoInputs, class_tasks, seeded
from torch import Tensor, nn
from torch.distributions import Bernoulli, Independent, Normal, kl_divergence

from metawrap import ArgumentError, NeuralStatistician, Task, TaskError
from metawrap.methods.neural_statistician import Gaussian, Statistician, divergence

SMALL: dict[str, Any] = {"context": 3, "latent": 2, "hidden": 4}


def normal(gaussian: Gaussian) -> Independent:
    return Independent(Normal(gaussian.mean, (gaussian.log_variance / 2).exp()), 1)


def gaussian(*shape: int, seed: int) -> Gaussian:
    return Gaussian(numbers(*shape, seed=seed), numbers(*shape, seed=seed + 1))


def bounded(value: Any) -> Any:
    return 5 * (np if isinstance(value, float) else torch).tanh(value / 5)


def spread(x: Tensor) -> Independent:
    mean, log_variance = x[: len(x) // 2], x[len(x) // 2 :]
    return Independent(Normal(mean, torch.exp(0.5 * bounded(log_variance))), 1)


def test_divergence_equals_torchs_and_is_broadcast() -> None:
    one, other = gaussian(3, 5, seed=0), gaussian(4, 1, 5, seed=2)
    expected = kl_divergence(normal(one), normal(other))
    torch.testing.assert_close(divergence(one, other), expected, rtol=1e-9, atol=1e-9)
    assert divergence(one, one).abs().max() < 1e-12


def test_bound_of_a_linear_gaussian_model_equals_hand_computation() -> None:
    """Everything is linear where the hidden layers are the identity: c = mean embedding, z = embedding + c."""
    model = Statistician(context=1, latent=1, hidden=2).double()
    x, embeddings = torch.tensor([[0.5], [2.0], [1.5]]).double(), torch.tensor([[1.0], [3.0], [2.0]]).double()
    labels = torch.tensor([0, 0, 1])
    with torch.no_grad():
        model.eval()(x, embeddings, labels, 2, False, False)
        # Positive numbers pass an ELU as they are: a hidden layer is (number, 0).
        statistic = model.statistic
        for network in (statistic.before, statistic.behind, model.prior, model.posterior, model.decoder):
            for layer in network:
                if isinstance(layer, nn.Linear):
                    layer.weight.zero_()
                    layer.bias.zero_()
            network[0].weight[0, 0] = 1.0
        model.posterior[0].weight[0, 1] = 1.0  # x's embedding + c
        model.decoder[2].weight[0, 0] = 1.0
        for network, log_variance in ((model.statistic.behind, -1.0), (model.prior, 0.5), (model.posterior, -2.0)):
            network[2].weight[0, 0] = 1.0
            network[2].bias[1] = log_variance
        model.observed.weight.copy_(torch.tensor([[0.5, 0.0]]))
        model.observed.bias.fill_(0.25)
        model.observed.log_variance.fill_(0.75)
        found = model(x, embeddings, labels, 2, False, False).numpy()

    narrow, prior, wide, noise = (bounded(value) for value in (-1.0, 0.5, -2.0, 0.75))

    def kl(mean: float, log_variance: float, other: float, other_log_variance: float) -> float:
        ratio = np.exp(log_variance - other_log_variance)
        return 0.5 * (ratio + (mean - other) ** 2 / np.exp(other_log_variance) - 1 - np.log(ratio))

    for way, (context, members) in enumerate([(2.0, [(0.5, 1.0), (2.0, 3.0)]), (2.0, [(1.5, 2.0)])]):
        bound = -kl(context, narrow, 0.0, 0.0)
        for value, embedding in members:
            z = embedding + context
            made = 0.5 * z + 0.25
            bound -= 0.5 * (np.log(2 * np.pi) + noise + (value - made) ** 2 / np.exp(noise))
            bound -= kl(z, wide, context, prior)
        assert found[way] == pytest.approx(bound, rel=1e-9)


@pytest.mark.parametrize("binary", [True, False])
def test_bound_equals_torchs_distributions_on_a_loop_over_classes(binary: bool) -> None:
    model = Statistician(**SMALL).double()
    inputs, embeddings = numbers(6, 5).sigmoid(), numbers(6, 7, seed=1)
    labels = torch.tensor([1, 0, 1, 2, 2, 2])
    model(inputs, embeddings, labels, 3, binary, False)
    with torch.no_grad():
        for index, parameter in enumerate(model.parameters()):
            parameter.add_(0.3 * numbers(*parameter.shape, seed=20 + index))
    torch.manual_seed(3)
    found = model(inputs, embeddings, labels, 3, binary, True)
    torch.manual_seed(3)
    c_noise, z_noise = torch.randn(3, 3, dtype=torch.float64), torch.randn(6, 2, dtype=torch.float64)
    parts = dict(model.named_parameters())

    def layer(x: Tensor, name: str) -> Tensor:
        return x @ parts[f"{name}.weight"].T + parts[f"{name}.bias"]

    for way in range(3):
        members = [i for i in range(6) if labels[i] == way]
        pooled = sum(F.elu(layer(embeddings[i], "statistic.before.0")) for i in members) / len(members)
        posterior = spread(layer(F.elu(layer(pooled, "statistic.behind.0")), "statistic.behind.2"))
        c = posterior.mean + posterior.stddev * c_noise[way]
        prior = spread(layer(F.elu(layer(c, "prior.0")), "prior.2"))
        bound = -kl_divergence(posterior, Independent(Normal(torch.zeros(3).double(), 1), 1))
        for i in members:
            own = spread(layer(F.elu(layer(torch.cat([embeddings[i], c]), "posterior.0")), "posterior.2"))
            z = own.mean + own.stddev * z_noise[i]
            hidden = F.elu(layer(F.elu(layer(torch.cat([z, c]), "decoder.0")), "decoder.2"))
            numbers_made = layer(hidden, "observed")
            if binary:
                fit = Bernoulli(logits=numbers_made, validate_args=False).log_prob(inputs[i]).sum()
            else:
                fit = (
                    Normal(numbers_made, (bounded(parts["observed.log_variance"]) / 2).exp()).log_prob(inputs[i]).sum()
                )
            bound = bound + fit - kl_divergence(own, prior)
        torch.testing.assert_close(found[way], bound, rtol=1e-9, atol=1e-9)


def test_a_target_is_of_the_class_whose_context_is_nearest_its_own() -> None:
    learner = NeuralStatistician(seeded(NormedMlp), **grouped(**SMALL))
    task = uneven((4,))
    step(learner, [task])
    found = learner.evaluate([task], keep_predictions=True).predictions[0]
    learner.eval()
    with torch.no_grad():
        support, target = (learner.embedding.of(x, "running") for x in (task.support_x, task.target_x))
        network = learner.statistician.statistic
        for row in range(len(target)):
            alone = spread(network.behind(network.before(target[row])))
            for way in range(3):
                members = [network.before(x) for x, y in zip(support, task.support_y, strict=True) if y == way]
                shown = spread(network.behind(sum(members) / len(members)))
                expected = -kl_divergence(shown, alone).item()
                assert found[row, way].item() == pytest.approx(expected, rel=1e-9, abs=1e-12)


def test_the_loss_is_minus_the_bound_of_support_and_targets_together_for_each_example() -> None:
    learner = NeuralStatistician(seeded(NormedMlp), norm="support", **grouped(**SMALL))
    task = uneven((4,))
    learner.evaluate([task])
    learner.eval()
    with torch.no_grad():
        support = learner.embedding.of(task.support_x, "capture")
        target = learner.embedding.of(task.target_x, "captured")
        inputs, labels = torch.cat([task.support_x, task.target_x]), torch.cat([task.support_y, task.target_y])
        bound = learner.statistician(inputs, torch.cat([support, target]), labels, 3, False, False)
    assert learner.evaluate([task]).loss == pytest.approx(-bound.sum().item() / len(labels), rel=1e-9)


def test_the_discriminative_term_is_added_with_its_weight() -> None:
    batch = class_tasks((4,), tasks=1)
    learner = NeuralStatistician(
        seeded(NormedMlp), loss_fn=F.cross_entropy, discriminative=0.5, **grouped(**SMALL)
    ).eval()
    output = learner(batch)
    whole = output.loss.item()
    learner.discriminative = 0.0
    own = learner(batch).loss.item()
    expected = own + 0.5 * F.cross_entropy(output.predictions[0], batch[3][0]).item()
    assert whole == pytest.approx(expected, rel=1e-12)


def test_inputs_in_0_to_1_are_bernoulli_and_others_are_refused_from_then_on() -> None:
    images = [part.sigmoid() if part.is_floating_point() else part for part in class_tasks((1, 10, 10))]
    learner = NeuralStatistician(seeded(MapNet), head="head", **grouped(**SMALL))
    step(learner, tuple(images))
    assert learner.statistician.observed.log_variance.numel() == 0
    before = fingerprint(learner)
    with pytest.raises(TaskError, match=r"'bernoulli' needs inputs in 0\.\.1.*likelihood='gaussian'"):
        step(learner, class_tasks((1, 10, 10)))
    assert fingerprint(learner) == before
    other = NeuralStatistician(seeded(MapNet), head="head", likelihood="gaussian", **grouped(**SMALL))
    step(other, tuple(images))
    assert other.statistician.observed.log_variance.numel() == 100
    with pytest.raises(ArgumentError, match="likelihood: the stored state is of 'bernoulli'"):
        other.load_state_dict(learner.state_dict())
    fresh = NeuralStatistician(seeded(MapNet), head="head", **grouped(**SMALL))
    fresh.load_state_dict(learner.state_dict())
    with pytest.raises(TaskError, match="bernoulli"):
        step(fresh, class_tasks((1, 10, 10)))


def test_inputs_that_no_decoder_could_make_are_refused() -> None:
    learner = NeuralStatistician(TwoInputs().double(), **grouped(**SMALL))
    x, y = (numbers(3, 2), numbers(3, 3)), torch.arange(3)
    with pytest.raises(TaskError, match="one floating-point tensor, but got"):
        learner.meta_step([Task(x, y, x, y)])
    with pytest.raises(TaskError, match="one floating-point tensor, but got"):
        NeuralStatistician(_Words(), **grouped(**SMALL)).meta_step([Task(y, y, y, y)])


class _Words(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table, self.head = nn.Embedding(5, 4), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.table(x))


def test_inputs_of_another_size_are_refused() -> None:
    learner = NeuralStatistician(seeded(lambda: _Averaging()), **grouped(**SMALL))
    learner.evaluate(class_tasks((1, 6, 6)))
    with pytest.raises(TaskError, match=r"inputs of 36 numbers.*these have 64"):
        learner.evaluate(class_tasks((1, 8, 8)))


class _Averaging(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.conv, self.head = nn.Conv2d(1, 4, 3), nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).mean((2, 3)))
