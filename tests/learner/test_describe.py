"""`describe`: its numbers against counts by hand, and its three looks: plain text, colours, HTML."""

from __future__ import annotations

import io
import json
import math
import re
import sys
import warnings
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
from html_page import VOID, HtmlPage
from keywords import grouped
from models import Conv4, NormedMlp, TiedNet, class_tasks, seeded
from rich.console import Console
from torch import Tensor, nn

from metawrap import FOMAML, MAML, Description, MAMLPlusPlus, ModuleRow

BATCH = class_tasks((4,))


class Everything(nn.Module):
    """A frozen layer, a norm to keep, a shared module, a tied weight, a norm to swap, an unused layer, and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Linear(4, 6).requires_grad_(False)
        self.kept = nn.BatchNorm1d(6)
        self.mix = nn.Linear(6, 6)
        self.alias = self.mix
        self.again = nn.Linear(6, 6)
        self.again.weight = self.mix.weight
        self.norm = nn.BatchNorm1d(6)
        self.act = nn.Tanh()
        self.spare = nn.Linear(6, 2)
        self.linear = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = self.alias(self.act(self.mix(self.kept(self.stem(x)))))
        return self.linear(self.act(self.norm(self.again(x))))


def seen(learner: Any) -> Any:
    """The learner, after a look at a task."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learner(BATCH)
    return learner


def everything(*, look: bool = True, **options: Any) -> Description:
    learner = MAMLPlusPlus(seeded(Everything), **grouped(**{"inner_steps": 3, "keep_norm": "kept", **options}))
    return (seen(learner) if look else learner).describe()


def named(name: str, module: nn.Module) -> nn.Sequential:
    model = nn.Sequential()
    model.add_module(name, module)
    return model


def rows(found: Description) -> dict[str, ModuleRow]:
    return {row.name: row for row in found.modules}


def line_of(text: object, name: str) -> str:
    return next(line for line in str(text).splitlines() if line.split()[:1] == [name])


def test_numbers_and_rates_are_those_counted_by_hand() -> None:
    found = everything()
    by_hand = {
        "stem": (6 * 4 + 6, 0),
        "kept": (6 + 6, 0),
        "mix": (6 * 6 + 6, 2 * 3),
        "again": (6, 3),
        "norm": (3 * 6 + 3 * 6, 0),
        "spare": (2 * 6 + 2, 2 * 3),
        "linear": (3 * 6 + 3, 2 * 3),
    }
    assert {name: (row.numbers, row.rates) for name, row in rows(found).items() if row.numbers} == by_hand
    assert found.rates == 21
    assert found.rate_range == (0.1, 0.1)


def test_every_parameter_is_in_one_group_and_in_one_row() -> None:
    found = everything()
    groups = {
        "adapted": (found.adapted, 42 + 6 + 14 + 21),
        "learned": (found.learned_only, 12 + 36),
        "frozen": (found.frozen, 30),
    }
    for group, numbers in groups.values():
        assert sum(map(math.prod, group.values())) == numbers
    assert sum(row.numbers for row in found.modules) == 83 + 48 + 30
    names = [name for group, _ in groups.values() for name in group]
    assert len(names) == len(set(names)) == 13


def test_rows_say_what_was_done_to_the_users_own_classes() -> None:
    assert {name: (row.kind, row.done) for name, row in rows(everything()).items()} == {
        "": ("Everything", "no parameters"),
        "stem": ("Linear", "frozen"),
        "kept": ("BatchNorm1d", "left alone, learned only"),
        "mix": ("Linear", "adapted"),
        "alias": ("Linear", "the same module as mix"),
        "again": ("Linear", "bias adapted, weight is mix.weight"),
        "norm": ("BatchNorm1d", "learned only, per step x3"),
        "act": ("Tanh", "no parameters"),
        "spare": ("Linear", "unused"),
        "linear": ("Linear", "adapted"),
    }


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({"per_step_norm_affine": False}, "learned only, statistics per step x3"),
        ({"per_step_norm_statistics": False}, "learned only, scale and shift per step x3"),
        ({"adapt_norm": True}, "adapted, statistics per step x3"),
    ],
)
def test_what_is_per_step_is_named_where_it_is_not_all(options: dict[str, Any], words: str) -> None:
    assert rows(everything(look=False, **options))["norm"].done == words


def test_a_norm_without_parameters_and_a_module_of_buffers_have_rows_too() -> None:
    class Buffered(NormedMlp):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.BatchNorm1d(6, affine=False)
            self.extra = nn.Module()
            self.extra.register_buffer("table", torch.zeros(2, 5))

    found = MAMLPlusPlus(Buffered(), inner_steps=2).describe()
    assert rows(found)["norm"].done == "per step x2"
    assert rows(found)["norm"].buffers["running_mean"] == (2, 6)
    assert rows(found)["extra"].done == "buffers only"
    assert line_of(found, "norm").endswith("per step x2")
    assert line_of(found, "extra").endswith("buffers only")


def test_one_module_of_two_fates_names_them() -> None:
    model = nn.Linear(4, 3)
    model.bias.requires_grad_(False)
    found = MAML(model).describe()
    assert rows(found)[""].done == "weight adapted, bias frozen"
    assert "(the model itself)" in str(found)


def test_a_parameter_frozen_after_wrapping_is_still_adapted() -> None:
    learner = MAML(NormedMlp())
    learner.model.first.requires_grad_(False)
    found = learner.describe()
    assert rows(found)["first"].done == "adapted from a frozen start"
    assert "first.weight" in found.adapted
    assert not found.frozen


def test_rates_are_those_of_the_moment() -> None:
    learner = MAMLPlusPlus(NormedMlp(), inner_steps=2)
    with torch.no_grad():
        learner.learning_rates["first.weight"][1] = -0.25
    found = learner.describe()
    assert found.rate_range == (-0.25, pytest.approx(0.1))
    assert "8, learned, -0.25 to 0.1" in str(found)
    assert "8, fixed, all 0.1" in str(MAML(NormedMlp(), inner_steps=2).describe())


def test_before_the_first_task_the_head_and_unused_parameters_are_said_to_be_unknown() -> None:
    before, after = everything(look=False), everything()
    assert not before.seen
    assert before.head is None
    assert rows(before)["spare"].done == "adapted"
    assert line_of(before, "head").endswith("known after the first task")
    assert line_of(before, "unused").endswith("known after the first task")
    assert after.seen
    assert line_of(after, "head").split() == ["head", "linear"]
    assert line_of(after, "unused").endswith("2 of the 7 adapted tensors")
    assert line_of(after, "linear").endswith("adapted, the head")
    unused = [f"the support loss does not depend on 'spare.{part}'" for part in ("weight", "bias")]
    assert [warning for warning in after.warnings if "spare" in warning] == unused


def test_a_parameter_unused_in_one_mode_only_is_not_called_unused() -> None:
    class TrainingOnly(NormedMlp):
        def __init__(self) -> None:
            super().__init__()
            self.aside = nn.Linear(4, 3)

        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) + (self.aside(x) if self.training else 0)

    learner = seen(MAML(seeded(TrainingOnly)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learner.evaluate(BATCH)
    found = learner.describe()
    assert rows(found)["aside"].done == "adapted"
    assert "the support loss does not depend on 'aside.weight' in eval mode" in found.warnings


def mlp(method: type[MAML] = MAML, **options: Any) -> MAML:
    return method(NormedMlp(), **grouped(**options))


@pytest.mark.parametrize(
    ("make", "line"),
    [
        (mlp, "gradient second order"),
        (partial(mlp, first_order_epochs=7), "gradient first order until epoch 7, then second order"),
        (partial(mlp, FOMAML), "gradient first order"),
        (
            partial(mlp, MAMLPlusPlus, wrapping={"keep_norm": "norm"}),
            "batch norm all left alone, on their stored statistics",
        ),
        (partial(MAMLPlusPlus, nn.Linear(4, 3)), "batch norm none in this network"),
    ],
)
def test_the_lines_below_the_table(make: Callable[[], MAML], line: str) -> None:
    assert " ".join(line_of(make().describe(), line.split()[0]).split()) == line


def test_a_head_start_that_is_not_learned_stands_beside_the_head() -> None:
    found = everything()
    started = Description(**{**vars(found), "settings": {**found.settings, "outputs.head_init": "zeros"}})
    assert line_of(started, "head").split(maxsplit=1)[1] == 'linear (outputs.head_init="zeros")'


def test_describing_changes_nothing() -> None:
    learner = MAMLPlusPlus(seeded(TiedNet))
    before = {name: value.clone() for name, value in learner.state_dict().items() if isinstance(value, Tensor)}
    version = [parameter._version for parameter in learner.parameters()]
    str(learner.describe())
    assert [parameter._version for parameter in learner.parameters()] == version
    assert all(torch.equal(value, before[name]) for name, value in learner.state_dict().items() if name in before)


def test_a_module_that_holds_itself_is_walked_once() -> None:
    model = NormedMlp()
    model.first.back = model
    found = MAML(model, engine="functional").describe()
    assert rows(found)["first.back"].same_as == ""
    assert sum(row.numbers for row in found.modules) == sum(p.numel() for p in model.parameters())


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.project = nn.Linear(4, 4)
        self.gate = nn.Sequential(nn.Linear(4, 4), nn.ReLU())

    def forward(self, x: Tensor) -> Tensor:
        return self.gate(self.project(x))


class Stack(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.Sequential(Block(), Block())
        self.again = self.blocks[0]
        self.drop = nn.Dropout()
        self.out = nn.Sequential(nn.ReLU(), nn.Linear(4, 3))

    def forward(self, x: Tensor) -> Tensor:
        return self.out(self.drop(self.again(self.blocks(x))))


def test_blocks_are_headers_and_lists_stay_in_front_of_their_parts() -> None:
    page = MAML(Stack()).describe().page()
    assert [(line.depth, line.label, line.path, line.role) for line in page.lines] == [
        (0, "blocks.0", "blocks.0", "header"),
        (1, "project", "blocks.0.project", "module"),
        (1, "gate.0", "blocks.0.gate.0", "module"),
        (0, "blocks.1", "blocks.1", "header"),
        (1, "project", "blocks.1.project", "module"),
        (1, "gate.0", "blocks.1.gate.0", "module"),
        (0, "again", "again", "module"),
        (0, "out.1", "out.1", "module"),
    ]
    assert page.more == "3 ReLU, Dropout"


@pytest.mark.parametrize("width", [20, 40, 60, 100, 200])
def test_text_keeps_to_the_width_without_escape_codes_or_trailing_spaces(
    monkeypatch: pytest.MonkeyPatch, width: int
) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    monkeypatch.setenv("FORCE_COLOR", "1")
    model = Stack()
    model.add_module("a_very_long_name_that_goes_on_" * 3, nn.Linear(2, 2))
    for text in map(str, (everything(), MAMLPlusPlus(Conv4()).describe(), MAML(model).describe())):
        assert max(map(len, text.splitlines())) <= width
        assert "\x1b" not in text
        assert not re.search(r"[ \t]$", text, re.MULTILINE)


@pytest.mark.parametrize("width", [60, 100, 200])
def test_numbers_are_whole_at_every_usual_width(monkeypatch: pytest.MonkeyPatch, width: int) -> None:
    monkeypatch.setenv("COLUMNS", str(width))
    model = nn.Sequential(nn.Linear(1000, 1234), nn.BatchNorm1d(1234), nn.Linear(1234, 5))
    text = str(MAMLPlusPlus(model, inner_steps=2).describe())
    assert "1,235,234" in line_of(text, "0")
    assert "per step x2" in line_of(text, "1")
    assert ("1234x1000" in text) == (width >= 100)


def test_a_long_name_loses_its_middle(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "60")
    found = MAML(named("front_" + "x" * 50 + "_back", nn.Linear(4, 3))).describe()
    assert re.match(r"front_x+\.\.\.x+_back ", str(found).splitlines()[4])


def test_the_text_suits_a_stdout_that_knows_only_ascii(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(io.BytesIO(), encoding="ascii"))
    text = str(everything())
    assert text.isascii()
    assert "-----" in text
    assert repr(everything()) == text


def printed(found: Description, **environment: str) -> str:
    console = Console(file=io.StringIO(), force_terminal=True, width=100, _environ={"TERM": "xterm", **environment})
    console.print(found)
    return console.file.getvalue()  # type: ignore[attr-defined]


COLOUR = re.compile(r"\x1b\[[0-9;]*(?:3[0-7]|9[0-7])m")


def test_a_terminal_gets_colours_and_the_same_words(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")
    found = everything()
    coloured = printed(found)
    assert COLOUR.search(coloured)
    bare = re.sub(r"\x1b\[[0-9;]*m", "", coloured)
    assert [line.rstrip() for line in bare.splitlines()] == str(found).splitlines()
    assert not COLOUR.search(printed(found, NO_COLOR="1"))


def test_names_are_not_read_as_markup() -> None:
    assert "[red]x[/red]" in str(MAML(named("[red]x[/red]", nn.Linear(4, 3))).describe())


HOSTILE = '<script>alert("&")</script>'


def test_html_is_balanced_and_loads_and_runs_nothing() -> None:
    page = everything()._repr_html_()
    parsed = HtmlPage(page)
    assert {"table", "details", "summary"} <= set(parsed.names)
    assert not {"script", "iframe", "object", *VOID} & set(parsed.names)
    names = {name for _, attributes in parsed.tags for name in attributes}
    assert not [name for name in names if name.startswith("on") or name in ("src", "href")]
    assert "url(" not in page
    for words in ("learned only", "per step x3", "the same module as mix", "83", "inner_steps="):
        assert words in " ".join(parsed.texts)
    [(_, style)] = parsed.elements("style")
    for selectors in re.findall(r"([^{}]+)\{", style):
        assert all(each.strip().startswith(".metawrap-description") for each in selectors.split(","))


def test_hostile_names_are_escaped_everywhere() -> None:
    model = named(HOSTILE, nn.Linear(4, 4))
    model.add_module("bell\x07\x1b[31m\nbreak", nn.Linear(4, 3))
    model[1].register_parameter('"><b>', nn.Parameter(torch.zeros(2)))
    model.add_module("odd", type("<i>Tanh</i>", (nn.Tanh,), {})())
    found = seen(MAML(model.double())).describe()
    parsed = HtmlPage(found._repr_html_())
    assert not {"script", "i", *VOID} & set(parsed.names)
    assert HOSTILE in parsed.texts
    assert HOSTILE in parsed.attributes("title")
    for look in (str(found), "".join(parsed.texts)):
        assert "\x1b" not in look
        assert "\x07" not in look
        assert r"bell\x07\x1b[31m\nbreak" in look
    assert "\x1b[31m\n" not in printed(found)


def test_warnings_and_notes_stand_in_all_looks() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        learner = MAMLPlusPlus(nn.DataParallel(NormedMlp()), first_order_epochs=20, msl_epochs=5)
    found = learner.describe()
    assert re.search(r"^warning +from epoch 5 to epoch 20", str(found), re.MULTILINE)
    assert re.search(r"^note +the model was taken out of its DataParallel", str(found), re.MULTILINE)
    text = "".join(HtmlPage(found._repr_html_()).texts)
    assert "Warning: from epoch 5 to epoch 20" in text
    assert "Note: the model was taken out of its DataParallel" in text


def test_to_dict_is_strict_json() -> None:
    found = FOMAML(seeded(TiedNet)).describe()
    stored = json.loads(json.dumps(found.to_dict(), allow_nan=False))
    assert stored["settings"]["first_order_epochs"] == "inf"
    assert stored["adapted"]["into.weight"] == [6, 6]
    assert {row["name"]: row["done"] for row in stored["modules"]}["again"] == "bias adapted, weight is into.weight"
    assert sum(row["numbers"] for row in stored["modules"]) == sum(p.numel() for p in TiedNet().parameters())


def test_a_description_cannot_be_changed() -> None:
    with pytest.raises(AttributeError):
        everything().head = "other"  # type: ignore[misc]
