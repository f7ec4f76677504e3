"""The multi-class SVM as a differentiable function: a QP library finds which bounds hold, one linear system the rest.

With X (examples, numbers), one-hot Y (examples, ways) and K = X X^T, the dual of Crammer and Singer's SVM is

    min over A (examples, ways) of  tr(A^T K A) / 2 - tr(A^T Y)   with   A <= C Y   and   A 1 = 0,

and W = X^T A. Where an entry is at its bound it is constant. The others, and the multipliers v of the equalities, solve

    (K A)_im + v_i = Y_im,   sum_m A_im = 0:

a linear system, differentiated as such. This is the derivative of the optimality conditions (Barratt 2018,
arXiv:1804.05098; Amos and Kolter 2017, arXiv:1703.00443), exact wherever the set of bounds that hold does not change,
which is almost everywhere.

Source: Crammer and Singer 2001, Journal of Machine Learning Research 2, 265-292, in the form of Lee et al. 2019,
arXiv:1904.03758, Eq. 7 and 8.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor

from metawrap.errors import ArgumentError, MetaWrapError

# By how much the diagonal of the kernel is raised, so that repeated examples share their weight in one way only.
_TIE = 1e-12


def multiclass_svm(inputs: Tensor, targets: Tensor, c: float) -> Tensor:
    """The SVM's weights: (examples, numbers), one-hot (examples, ways) to (numbers, ways).

    Works in double precision on the CPU, whatever the inputs are. Not finite where the inputs are not.

    Raises:
        MetaWrapError: the solver gave up.
    """
    x, y = inputs.to("cpu", torch.float64), targets.detach().to("cpu", torch.float64)
    kernel = x @ x.T
    if not bool(torch.isfinite(kernel).all()):
        return inputs.T @ (targets * torch.nan)
    # In units where neither the bounds nor the kernel is above 1 by much: A = unit * dual.
    unit = min(c, 1 / max(float(kernel.detach().diagonal().mean()), 1e-300))
    diagonal = unit * kernel.detach().diagonal()
    kernel = unit * kernel + torch.diag(_TIE * diagonal.clamp_min(1e-6))
    bounds = c / unit * y
    near = _near(kernel.detach(), y, bounds)
    weights = x.T @ (unit * _on_the_bounds(kernel, y, bounds, near.free))
    _check_optimal(x.detach(), y, c, weights.detach(), unit * near.dual)
    return weights.to(inputs)


def _on_the_bounds(kernel: Tensor, targets: Tensor, bounds: Tensor, free: Tensor) -> Tensor:
    """The dual's solution, differentiable with respect to the kernel, where all entries but the free ones are known."""
    held = bounds.masked_fill(free, 0)
    example, way = free.nonzero(as_tuple=True)
    count, examples = len(example), len(kernel)
    both = kernel[example][:, example] * (way[:, None] == way)
    sums = torch.nn.functional.one_hot(example, examples).to(kernel)
    system = torch.cat([torch.cat([both, sums], 1), torch.cat([sums.T, sums.new_zeros(examples, examples)], 1)])
    wanted = torch.cat([(targets - kernel @ held)[free], -held.sum(1)])
    solved = torch.linalg.solve(system, wanted)
    return held.index_put((example, way), solved[:count])


class _Near(NamedTuple):
    """The dual's solution as the library gives it, and which of its entries are not at their bound."""

    dual: Tensor
    free: Tensor


def _near(kernel: Tensor, targets: Tensor, bounds: Tensor) -> _Near:
    import piqp

    examples, ways = targets.shape
    solver = piqp.DenseSolver()
    solver.settings.eps_abs, solver.settings.eps_rel, solver.settings.check_duality_gap = 1e-10, 1e-12, True
    limits = bounds.flatten().numpy()
    solver.setup(
        P=np.asfortranarray(np.kron(kernel.numpy(), np.eye(ways))),
        c=-targets.flatten().numpy(),
        A=np.asfortranarray(np.kron(np.eye(examples), np.ones((1, ways)))),
        b=np.zeros(examples),
        x_u=limits,
    )
    solver.solve()  # Where it ends short of that precision its solution may serve all the same; see _check_optimal.
    dual = np.array(solver.result.x)
    # At a solution one of the two is zero: the distance to the bound, or the multiplier that pushes towards it.
    free = np.asarray(solver.result.z_bu) < limits - dual
    return _Near(torch.from_numpy(dual).view_as(bounds), torch.from_numpy(free).view_as(bounds))


def _check_optimal(inputs: Tensor, targets: Tensor, c: float, weights: Tensor, dual: Tensor) -> None:
    """Raises MetaWrapError where the weights' value is further from that of a point of the dual than rounding explains.

    No weights have a smaller value than any point of the dual, so those that reach it are the solution.
    """
    scores = inputs @ weights
    hinges = (scores + 1 - targets).amax(1) - (scores * targets).sum(1)
    value = weights.square().sum() / 2 + c * hinges.sum()
    gap = value - (dual * targets).sum() + (inputs.T @ dual).square().sum() / 2
    if not gap.abs() <= 1e-4 * (value + 1e-3 * c * len(inputs)):
        raise MetaWrapError(
            f"The SVM of a support set of {len(inputs)} examples could not be solved to the precision of a gradient. "
            'Embeddings of very unlike sizes may be why: end the embedding with a norm, or use solver="ridge".'
        )


def check_solver() -> None:
    """Raises ArgumentError where the library that solves the QP is not installed."""
    try:
        import piqp  # noqa: F401
    except ImportError as error:
        raise ArgumentError(
            'solver: "svm" needs the library piqp, which is not installed. Run pip install "metawrap[metaoptnet]", or '
            'pass solver="ridge".'
        ) from error
