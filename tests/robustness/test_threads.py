"""Eight threads on one learner: calls of all methods in random order, each held against the lone call.

`make trust` runs 1,000 calls of each method; every test run a few.
"""

from __future__ import annotations

import random
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain
from typing import Any

import pytest
import torch
from contract import METHODS, VARIANTS, batch_of, make, quiet
from face import fingerprint
from torch import Tensor

from metawrap.tasks import tensors_in

THREADS = 8


def adapt(learner: Any, batch: Any) -> list[Tensor]:
    with torch.no_grad():
        return tensors_in(learner.adapt(batch[0].support_x, batch[0].support_y)(batch[0].target_x))


def evaluate(learner: Any, batch: Any) -> list[Tensor]:
    found = learner.evaluate(batch, keep_predictions=True)
    return [*tensors_in(found.predictions), torch.tensor([found.mean, found.loss])]


def forward(learner: Any, batch: Any) -> list[Tensor]:
    found = learner(batch)
    learned = [parameter for parameter in learner.parameters() if parameter.requires_grad]
    gradients = torch.autograd.grad(found.loss, learned, allow_unused=True)
    return [found.loss.detach(), *(gradient for gradient in gradients if gradient is not None)]


def stressed(case: str, calls: int, kinds: tuple[Callable[..., list[Tensor]], ...]) -> None:
    """Raises AssertionError where a call beside others differs from the lone call, or leaves the learner changed."""
    learner = make(case)
    first = batch_of(case)
    with quiet():
        learner.meta_step(first)
    learner.eval()
    joint = case.startswith(("fine-tune", "multi-task"))  # They know the classes and tasks that they trained on.
    batches = [[task] for task in first] if joint else [batch_of(case, tasks=1, seed=seed) for seed in range(4)]
    pairs = [(kind, place) for kind in kinds for place in range(len(batches))]
    alone = {(kind, place): kind(learner, batches[place]) for kind, place in pairs}
    before = fingerprint(learner)

    def work(seed: int) -> None:
        stream = random.Random(seed)
        for _ in range(calls // THREADS):
            kind, place = stream.choice(pairs)
            found = kind(learner, batches[place])
            torch.testing.assert_close(found, alone[kind, place], rtol=1e-6, atol=1e-6)

    with ThreadPoolExecutor(THREADS) as pool:
        list(pool.map(work, range(THREADS)))
    assert fingerprint(learner) == before


@pytest.mark.parametrize("case", ["maml++", "anil", "r2d2"])
def test_a_few_calls_in_eight_threads_are_each_what_the_lone_call_is(case: str) -> None:
    stressed(case, 2 * THREADS, (adapt, evaluate, forward))


@pytest.mark.trust
@pytest.mark.timeout(0)
@pytest.mark.parametrize("case", list(chain(METHODS, VARIANTS)))
def test_many_calls_in_eight_threads_are_each_what_the_lone_call_is(case: str) -> None:
    stressed(case, 1000 if case in METHODS else 200, (adapt, evaluate))
