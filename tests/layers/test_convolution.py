"""The convolution with its own second derivative: against torch's, and against finite differences."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
from derivatives import assert_same_derivatives, derivatives
from torch import Tensor, nn
from torch.autograd import gradcheck, gradgradcheck

from metawrap.layers import quick_forms
from metawrap.layers.quick_forms import QuickForms, convolution

NATIVE = {1: F.conv1d, 2: F.conv2d, 3: F.conv3d}
# dimensions, in, out, kernel, stride, padding, dilation, groups
FORMS: list[Any] = [
    (2, 3, 4, 3, 1, 1, 1, 1),
    (2, 3, 4, (3, 2), (2, 1), (1, 0), (1, 2), 1),
    (2, 4, 6, 3, 2, 0, 1, 2),
    (2, 4, 4, 3, 1, 2, 2, 4),
    (2, 3, 5, 1, 3, 0, 1, 1),
    (1, 3, 4, 3, 2, 1, 1, 1),
    (3, 2, 3, 2, 1, 1, 1, 1),
]


def inputs(form: Any, bias: bool = True) -> list[Tensor]:
    dimensions, channels, out, kernel, *_, groups = form
    generator = torch.Generator().manual_seed(0)
    sides = (kernel,) * dimensions if isinstance(kernel, int) else kernel
    shapes = [(2, channels, *(7, 6, 5)[:dimensions]), (out, channels // groups, *sides), *([(out,)] if bias else [])]
    return [torch.randn(s, generator=generator, dtype=torch.float64).requires_grad_() for s in shapes]


@pytest.mark.parametrize("form", FORMS, ids=str)
@pytest.mark.parametrize("asked", [[0], [1], [2], [0, 1], [1, 2], [0, 1, 2]], ids=str)
def test_both_derivatives_equal_torchs_own(form: Any, asked: list[int]) -> None:
    geometry = form[4:]
    native = derivatives(lambda x, w, b: NATIVE[form[0]](x, w, b, *geometry), inputs(form), asked)
    ours = derivatives(lambda x, w, b: convolution(x, w, b, *geometry), inputs(form), asked)
    assert_same_derivatives(ours, native)


@pytest.mark.sampled(1)
@pytest.mark.parametrize("form", FORMS[:2] + FORMS[5:], ids=str)
def test_both_derivatives_equal_finite_differences(form: Any) -> None:
    def run(*tensors: Tensor) -> Tensor:
        return convolution(*tensors, *form[4:])

    small = [tensor[..., :3].detach().requires_grad_() if i == 0 else tensor for i, tensor in enumerate(inputs(form))]
    assert gradcheck(run, small)
    assert gradgradcheck(run, small)


def test_the_third_derivative_equals_torchs_own() -> None:
    def third(run: Any) -> Tensor:
        x, w = inputs(FORMS[0], bias=False)
        first = torch.autograd.grad(run(x, w).pow(4).sum(), w, create_graph=True)[0]
        second = torch.autograd.grad(first.pow(2).sum(), w, create_graph=True)[0]
        return torch.autograd.grad(second.pow(2).sum(), x)[0]

    ours, native = (
        third(lambda x, w: convolution(x, w, None, 1, 1, 1, 1)),
        third(lambda x, w: F.conv2d(x, w, padding=1)),
    )
    torch.testing.assert_close(ours, native, rtol=1e-9, atol=0)


def lent(layer: nn.Module, x: Tensor, twice: bool = True) -> Tensor:
    """What the layer gives with the quick forms, which are gone afterwards."""
    before = dict(vars(layer))
    with QuickForms([(layer, layer)]).lent(twice):
        output: Tensor = layer(x)
    assert vars(layer) == before
    return output


def is_ours(output: Tensor) -> bool:
    return output.grad_fn is not None and output.grad_fn.name() in ("_ConvolutionBackward", "_MaxPoolBackward")


def of_form(form: Any, **keywords: Any) -> nn.Module:
    kinds: Any = {1: nn.Conv1d, 2: nn.Conv2d, 3: nn.Conv3d}
    return kinds[form[0]](*form[1:], **keywords).double()  # type: ignore[no-any-return]


@pytest.mark.parametrize("form", FORMS, ids=str)
def test_a_layer_is_lent_the_form_where_it_is_differentiated_twice(form: Any) -> None:
    layer, x = of_form(form), inputs(form)[0]
    assert is_ours(lent(layer, x))
    assert not is_ours(lent(layer, x, twice=False))
    assert torch.equal(lent(layer, x), layer(x))


def test_what_a_layer_is_told_at_its_call_counts() -> None:
    layer, x = of_form(FORMS[0]), inputs(FORMS[0])[0]
    with QuickForms([(layer, layer)]).lent(twice=True):
        layer.stride = (2, 2)
        assert layer(x).shape == (2, 4, 4, 3)


def test_a_failed_call_takes_the_forms_back() -> None:
    layer = of_form(FORMS[0])
    with pytest.raises(RuntimeError, match="channels"):
        lent(layer, torch.rand(2, 5, 7, 6, dtype=torch.float64))
    assert "_conv_forward" not in vars(layer)


@pytest.mark.parametrize(("side", "taken"), [(39, False), (41, True)])
def test_only_large_convolutions_are_taken(side: int, taken: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    # 2 * 5 images * side^2 places / 4 by the stride * 8 * 8 * 9 weights: 2.19e6 and 2.42e6.
    monkeypatch.setattr(quick_forms, "LARGE", 2.3e6)
    layer, x = nn.Conv2d(8, 8, 3, stride=2, padding=1), torch.rand(5, 8, side, side, requires_grad=True)
    assert is_ours(lent(layer, x)) is taken
    # Where the form saves more, smaller ones are, too.
    assert is_ours(lent(layer, x.detach()))
    assert is_ours(lent(layer, x.contiguous(memory_format=torch.channels_last)))


@pytest.mark.parametrize(
    "case", ["same", "circular", "unbatched", "no grad", "autocast", "vmap", "frozen", "half", "own", "subclass"]
)
def test_the_forms_leave_alone_what_they_do_not_know(case: str) -> None:
    class Own(nn.Conv2d):
        pass

    x = inputs(FORMS[0])[0]
    keywords = {"same": {"padding": "same"}, "circular": {"padding": 1, "padding_mode": "circular"}}
    layer: Any = (Own if case == "subclass" else nn.Conv2d)(3, 4, 3, **keywords.get(case, {"padding": 1})).double()
    if case == "unbatched":
        x = x[0]
    elif case == "half":
        layer, x = layer.bfloat16(), x.bfloat16()
    elif case == "frozen":
        layer.requires_grad_(False)
    elif case == "own":
        layer._conv_forward = lambda x, w, b: F.conv2d(x, w, b, padding=1)
    with torch.set_grad_enabled(case != "no grad"), torch.autocast("cpu", torch.bfloat16, enabled=case == "autocast"):
        expected = layer(x)
        out = torch.func.vmap(lambda one: lent(layer, one[None])[0])(x) if case == "vmap" else lent(layer, x)
    assert not is_ours(out)
    assert out.dtype == expected.dtype
    torch.testing.assert_close(out, expected)
