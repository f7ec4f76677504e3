"""The max-pooling with a derivative of its own: against torch's, and against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from metawrap.layers import quick_forms
from metawrap.layers.quick_forms import QuickForms, max_pool2d

# kernel, stride, padding, dilation, ceil_mode
WINDOWS: list[Any] = [(2,), (3, 2, 1), ((3, 2), (1, 2), (1, 0), (2, 1)), (3, 2, 0, 1, True), (2, None, 0, 1, False)]
LAYOUTS = [torch.contiguous_format, torch.channels_last]


def images(layout: torch.memory_format, levels: int = 0) -> Tensor:
    """Random ones; of few levels, so that most windows have ties."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(3, 4, 8, 7, generator=generator, dtype=torch.float64)
    x = x if not levels else torch.randint(levels, x.shape, generator=generator).double()
    return x.contiguous(memory_format=layout).requires_grad_()


def derivatives(pool: Any, x: Tensor) -> list[Tensor]:
    """Output, gradient, and the derivatives of that along a direction, with a layer below, as in a network."""
    generator = torch.Generator().manual_seed(1)
    output = pool(x.tanh())
    upstream = torch.randn(output.shape, generator=generator, dtype=torch.float64).requires_grad_()
    first = torch.autograd.grad(output, x, upstream, create_graph=True)[0]
    along = (first * torch.randn(first.shape, generator=generator, dtype=torch.float64)).sum()
    second = torch.autograd.grad(along, [x, upstream], create_graph=True)
    third = torch.autograd.grad(sum(g.square().sum() for g in second), [x, upstream])
    return [output, first, *second, *third]


@pytest.mark.parametrize("levels", [0, 3])
@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
@pytest.mark.parametrize("window", WINDOWS, ids=str)
def test_all_derivatives_equal_torchs_own(window: Any, layout: torch.memory_format, levels: int) -> None:
    x = images(layout, levels)
    found = derivatives(lambda t: max_pool2d(t, *window), x)
    expected = derivatives(lambda t: F.max_pool2d(t, *window), images(torch.contiguous_format, levels))
    for ours, native in zip(found, expected, strict=True):
        torch.testing.assert_close(ours, native, rtol=1e-12, atol=1e-13)
    assert found[0].is_contiguous(memory_format=layout)
    assert found[1].is_contiguous(memory_format=layout)


@pytest.mark.parametrize("layout", LAYOUTS, ids=str)
def test_derivatives_equal_finite_differences(layout: torch.memory_format) -> None:
    x = images(layout)[:1, :2, :5].detach().requires_grad_()
    assert gradcheck(lambda t: max_pool2d(t, 3, 2, 1), x)
    assert gradgradcheck(lambda t: max_pool2d(t.sin(), 3, 2, 1), x)


def test_what_is_not_a_number_stays_so() -> None:
    x = images(torch.contiguous_format).detach()
    x[0, 0, 3, 3], x[1, 0] = torch.nan, -torch.inf
    x.requires_grad_()
    torch.testing.assert_close(max_pool2d(x, 3, 2, 1), F.max_pool2d(x, 3, 2, 1), equal_nan=True, rtol=0, atol=0)


@pytest.mark.parametrize(
    ("layout", "twice", "taken"), [(0, False, True), (0, True, True), (1, False, False), (1, True, True)]
)
def test_layers_are_lent_it_where_it_pays(layout: int, twice: bool, taken: bool) -> None:
    layer, x = nn.MaxPool2d(3, 2, 1, ceil_mode=True), images(LAYOUTS[layout])
    with QuickForms([(layer, layer)]).lent(twice):
        found = layer(x)
    assert found.grad_fn is not None
    assert (found.grad_fn.name() == "_MaxPoolBackward") is taken
    assert torch.equal(found, layer(x))
    assert "forward" not in vars(layer)


@pytest.mark.parametrize("twice", [False, True])
def test_only_large_ones_are_taken_in_the_usual_layout(twice: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    layer, x = nn.MaxPool2d(2), images(torch.contiguous_format)
    for limit, name in ((x.numel(), "_MaxPoolBackward"), (x.numel() + 1, "MaxPool2DWithIndicesBackward0")):
        monkeypatch.setattr(quick_forms, "LARGE_POOLING", limit)
        with QuickForms([(layer, layer)]).lent(twice):
            found = layer(x)
        assert found.grad_fn is not None
        assert found.grad_fn.name() == name


@pytest.mark.parametrize("case", ["indices", "unbatched", "no gradient", "own", "subclass"])
def test_other_layers_are_left_alone(case: str) -> None:
    class Own(nn.MaxPool2d):
        pass

    layer: Any = (Own if case == "subclass" else nn.MaxPool2d)(2, return_indices=case == "indices")
    x = images(torch.contiguous_format)
    x = x[0] if case == "unbatched" else x.detach() if case == "no gradient" else x
    if case == "own":
        layer.forward = lambda x: F.max_pool2d(x, 2)
    expected, before = layer(x), dict(vars(layer))
    with QuickForms([(layer, layer)]).lent(twice=True):
        found = layer(x)
    assert vars(layer) == before
    if case == "indices":
        (found, places), (expected, wanted) = found, expected
        assert torch.equal(places, wanted)
    assert torch.equal(found, expected)
    assert found.grad_fn is None or found.grad_fn.name() != "_MaxPoolBackward"
