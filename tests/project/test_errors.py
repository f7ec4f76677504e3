"""Advice is true: what a message names exists, and the fix that an error names works.

The first half reads every text of the package. The second half provokes errors, does what each says, and sees it work.
"""

from __future__ import annotations

import argparse
import re
import shlex
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from bird_runs import CLASSES, FLAGS, write_birds, write_class
from messages import OBJECTS, exists, fields_of_groups, messages, named, public_keywords
from models import NormedMlp, class_tasks, seeded
from published import cub_folder
from torch import Tensor, nn
from torch.distributed.run import get_args_parser
from torch.optim import lr_scheduler

from metawrap import (
    MAML,
    MatchingNet,
    MemoryModule,
    MetaWrapError,
    NeuralStatistician,
    ProtoNet,
    RelationNet,
    Task,
    TaskBatch,
)
from metawrap.cli import main
from metawrap.cli.arguments import build_parser
from metawrap.cli.flags_to_settings import flag_of
from metawrap.data import EpisodeSampler, ImageSet, LabelledImages, splits_from
from metawrap.settings.groups import GROUPS
from metawrap.training import RunSettings

REPOSITORY = Path(__file__).parents[2]


def parsers() -> dict[str, argparse.ArgumentParser]:
    commands = dict(build_parser().commands)  # type: ignore[attr-defined]
    [inner] = [a for a in commands["data"]._actions if isinstance(a, argparse._SubParsersAction)]
    return commands | {"data": inner.choices["check"]}


def flags_of(parser: argparse.ArgumentParser) -> set[str]:
    return {flag for action in parser._actions for flag in action.option_strings}


KNOWN = {flag for parser in parsers().values() for flag in flags_of(parser)}
FLAG, KEYWORD = r"(?<![\w-])(--[a-z][a-z-]*[a-z])", r"(?<![\w.'\"{\[<-])([a-z_]\w+)=(?!=)"


def test_there_are_messages_to_check() -> None:
    assert len(messages()) > 700
    assert len(named(FLAG)) > 50
    assert len(named(KEYWORD)) > 50


def test_every_flag_that_a_message_names_exists() -> None:
    torchrun = flags_of(get_args_parser())
    assert not [place for flag, place in named(FLAG) if flag not in KNOWN | torchrun]


def test_the_flag_of_a_setting_exists() -> None:
    stored = {action.dest: action.option_strings for action in parsers()["train"]._actions}
    for name in RunSettings().to_dict().keys() - {"options"}:
        assert flag_of(name) in stored[name], name


def test_every_command_that_a_message_names_takes_its_flags() -> None:
    """`metawrap train --out X --resume`, up to the end of the words and flags."""
    found = named(r"metawrap (\w+(?: check)?(?: (?:--?[a-z-]+|[A-Z][A-Z=]*|X))*)")
    commands = [
        (shlex.split(words), place) for words, place in found if words.split()[0] in parsers() or " --" in words
    ]
    assert len(commands) > 10
    wrong = [
        place
        for (name, *rest), place in commands
        if name not in parsers() or not {word for word in rest if word.startswith("--")} <= flags_of(parsers()[name])
    ]
    assert not wrong, "\n".join(wrong)


def test_every_keyword_that_a_message_names_exists() -> None:
    """A field of a group counts only beside its group: `memory=` alone is no keyword of a learner."""
    groups = fields_of_groups()
    wrong = [
        f"{keyword}= in {place}"
        for keyword, place in named(KEYWORD)
        if keyword not in public_keywords()
        if not any(group in place.partition(": ")[2] for group in groups.get(keyword, ()))
        if "settings/groups.py" not in place  # `self.named` puts the group before the field.
    ]
    assert not wrong, "\n".join(wrong)


def test_every_name_with_a_dot_exists() -> None:
    learner = MAML(seeded(NormedMlp), scheduler=None)
    roots = "|".join([*OBJECTS, *GROUPS, "learner"])
    found = named(rf"(?<![\w.'\"/])((?:{roots})(?:\.[A-Za-z_]\w*)+)")
    other = (".npz", ".txt", ".yaml", ".X")  # Files, and names that are filled in.
    wrong = [f"{name} in {place}" for name, place in found if not name.endswith(other) and not exists(name, learner)]
    assert len(found) > 30
    assert not wrong, "\n".join(wrong)


def test_every_file_and_extra_that_a_message_names_exists() -> None:
    _, _, listed = (REPOSITORY / "pyproject.toml").read_text().partition("[project.optional-dependencies]")
    extras = re.findall(r"^(\w+) = \[", listed.partition("\n[")[0], re.MULTILINE)
    assert not [place for name, place in named(r"metawrap\[(\w+)\]") if name not in extras]
    files = named(r"\b((?:docs|examples|benchmarks|tests)/[\w/]+\.\w+)")
    assert files
    assert not [place for name, place in files if not (REPOSITORY / name).exists()]


# --- errors of the command line, and what each says to do ------------------------------------------------------------


def split_file(**parts: list[str]) -> None:
    rows = [f"{name},{part}" for part, names in parts.items() for name in names]
    Path("split.csv").write_text("\n".join(["class,split", *rows]) + "\n")


def forget(*names: str) -> Callable[[], None]:
    return lambda: [shutil.rmtree(n) if Path(n).is_dir() else Path(n).unlink() for n in names]  # type: ignore[return-value]


def damage_checkpoints() -> None:
    for path in Path("run/checkpoints").iterdir():
        path.write_bytes(b"torn")


def copy_with_one_more() -> None:
    shutil.copytree("birds", "copy")
    write_class(Path("copy"), "albatross")


NOTHING = lambda: None
TRAIN = f"train {shlex.join(FLAGS)}"
NAMED = {"train": CLASSES[:8], "validation": CLASSES[8:14], "test": CLASSES[14:]}
# Before the command; the command; the advice; an action that it asks for, if any; the command after it, with the words
# that the advice gives.
COMMANDS: dict[str, tuple[Callable[[], Any], str, str, Callable[[], Any], str]] = {
    "resume of a run that is not there": (
        *(NOTHING, "train --resume --out typo", r"Start one with: metawrap (train --out typo)"),
        *(NOTHING, f"{{0}} {shlex.join(FLAGS)}"),
    ),
    "test of a run that is not there": (
        *(NOTHING, "evaluate typo", r"Start one with: metawrap (train --out typo)"),
        *(NOTHING, f"{{0}} {shlex.join(FLAGS)}"),
    ),
    "report of a run that is not there": (
        *(NOTHING, "report typo", r"Start one with: metawrap (train --out typo)"),
        *(NOTHING, f"{{0}} {shlex.join(FLAGS)}"),
    ),
    "a run that is there": (
        *(NOTHING, f"{TRAIN} --out run", "Continue it with (--resume)", NOTHING, "train {0} --out run"),
    ),
    "a run that is there, another": (
        *(NOTHING, f"{TRAIN} --out run", "or choose another (--out)"),
        *(NOTHING, f"{TRAIN} {{0}} another"),
    ),
    "another setting": (
        *(NOTHING, "train --resume --out run --shots 2", "shots: .*Leave it out"),
        *(NOTHING, "train --resume --out run"),
    ),
    "a run without its settings": (
        *(forget("run/run.json"), "train --resume --out run", "start again with another (--out)"),
        *(NOTHING, f"{TRAIN} {{0}} new"),
    ),
    "a class more, tested": (
        *(lambda: write_class(Path("birds"), "albatross"), "evaluate run", "metawrap (evaluate run --new-classes)"),
        *(NOTHING, "{0}"),
    ),
    "a class more, trained on": (
        *(lambda: write_class(Path("birds"), "albatross"), "train --resume --out run"),
        *("a new run with another (--out)", NOTHING, f"{TRAIN} {{0}} new"),
    ),
    "a class more, removed again": (
        *(lambda: write_class(Path("birds"), "albatross"), "evaluate run", "Put them back as they were"),
        *(forget("birds/albatross"), "evaluate run"),
    ),
    "other data with classes of the training": (
        *(copy_with_one_more, "evaluate run --data copy", "Test on data with other classes"),
        *(lambda: write_birds(Path("fish"), [f"fish{number}" for number in range(12)]), "evaluate run --data fish"),
    ),
    "other data with classes of the training, left out": (
        *(copy_with_one_more, "evaluate run --data copy", "metawrap (evaluate run --data copy --new-classes)"),
        *(NOTHING, "{0}"),
    ),
    "no record of the data": (
        *(forget("run/data.json"), "evaluate run --new-classes", "Leave (--new-classes) out"),
        *(NOTHING, "evaluate run"),
    ),
    "a damaged record of the data": (
        *(lambda: Path("run/data.json").write_text("{"), "evaluate run", r"'(run/data.json)' is damaged.*or delete it"),
        *(forget("run/data.json"), "evaluate run"),
    ),
    "runs over seeds": (
        *(lambda: main([*TRAIN.split(), "--seeds", "4,7", "--out", "seeds"]), "evaluate seeds", "such as '(.*)'"),
        *(NOTHING, "evaluate {0}"),
    ),
    "a run without an epoch": (
        *(forget("run/checkpoints"), "evaluate run", "Continue it with: metawrap (train --out run --resume)"),
        *(NOTHING, "{0}"),
    ),
    "torn checkpoints": (damage_checkpoints, "evaluate run", "another (--out)", NOTHING, f"{TRAIN} {{0}} new"),
    "too many ways": (NOTHING, f"{TRAIN} --ways 9", r"\((--ways \d+)\) or fewer", NOTHING, f"{TRAIN} {{0}}"),
    "too many ways in training": (
        *(NOTHING, f"{TRAIN} --train-ways 99", r"\((--train-ways \d+)\) or fewer"),
        *(NOTHING, f"{TRAIN} {{0}}"),
    ),
    "too few classes in a part": (
        *(NOTHING, f"{TRAIN} --ways 5", r"validation has only 3 classes .* split= \((--split) FILE\)"),
        *(lambda: split_file(**NAMED), f"{TRAIN} --ways 5 {{0}} split.csv"),
    ),
    "one class in a part": (
        *(
            lambda: split_file(**{**NAMED, "test": ["bird19"]}),
            f"{TRAIN} --split split.csv",
            "test has only 1 class .*Add",
        ),
        *(lambda: split_file(**NAMED), f"{TRAIN} --split split.csv"),
    ),
    "too many images of a class": (
        *(NOTHING, f"{TRAIN} --shots 2 --targets 3", r"\((--shots \d --targets \d)\)"),
        *(NOTHING, f"{TRAIN} {{0}}"),
    ),
    "too many ways of an episode": (
        *(NOTHING, "data check birds --ways 4 --targets 1", r"\((--ways \d+)\) or fewer"),
        *(NOTHING, "data check birds {0} --targets 1"),
    ),
    "classes that a split invents": (
        *(lambda: split_file(**{**NAMED, "train": [*CLASSES[:8], "owl", "kite"]}), f"{TRAIN} --split split.csv"),
        *(
            "'owl', 'kite' of train do not exist.*leave them out",
            lambda: split_file(**NAMED),
            f"{TRAIN} --split split.csv",
        ),
    ),
    "classes that a split names twice": (
        *(lambda: split_file(**{**NAMED, "test": CLASSES[12:]}), f"{TRAIN} --split split.csv"),
        *(r"'bird12 \(validation and test\)', 'bird13.*each once", lambda: split_file(**NAMED)),
        f"{TRAIN} --split split.csv",
    ),
    "a broken image": (
        *(lambda: Path("birds/bird04/x.png").write_text("junk"), TRAIN, r"'bird04/x\.png' is not .* or remove it"),
        *(forget("birds/bird04/x.png"), TRAIN),
    ),
    "an image too small for the network": (
        *(NOTHING, f"{TRAIN} --image-size 8", r"expected at least (\d+) for"),
        *(NOTHING, f"{TRAIN} --image-size {{0}}"),
    ),
    "a data set without its files": (
        *(NOTHING, f"{TRAIN} --data cub", r"needs root: .* \((--data-root)\)"),
        *(lambda: cub_folder(Path()), f"{TRAIN} --data cub {{0}} CUB_200_2011"),
    ),
    "a misspelt data set": (NOTHING, f"{TRAIN} --data glyph", "Did you mean '(.*)'", NOTHING, f"{TRAIN} --data {{0}}"),
    "a misspelt flag": (NOTHING, "evaluate run --taks 2", "Did you mean (--tasks)", NOTHING, "evaluate run {0} 2"),
    "a misspelt option": (
        *(NOTHING, f"{TRAIN} --method maml --set execution.worker=1", "Did you mean '(.*)'"),
        *(NOTHING, f"{TRAIN} --method maml --set {{0}}=1"),
    ),
    "a setting with another flag": (
        *(NOTHING, f"{TRAIN} --batch 0", r"(--batch): tasks_per_batch: .* at least (\d)"),
        *(NOTHING, f"{TRAIN} {{0}} {{1}}"),
    ),
    "a setting given twice": (NOTHING, f"{TRAIN} --set ways=3", "Leave out one of them", NOTHING, TRAIN),
    "a network with fewer outputs": (
        *(NOTHING, f"{TRAIN} --method maml --ways 3 --model net:two", "has 2 outputs.* (--ways) sets how many"),
        *(NOTHING, f"{TRAIN} --method maml --model net:two {{0}} 2"),
    ),
    "a network with fewer outputs, looked at": (
        *(NOTHING, "inspect --model net:two --input-shape 3,16,16", "has 2 outputs.* (--ways) sets how many"),
        *(NOTHING, "inspect --model net:two --input-shape 3,16,16 {0} 2"),
    ),
    "a model that is no name": (
        *(NOTHING, f"{TRAIN} --method maml --model net", r"expected 'package\.module:factory'"),
        *(NOTHING, f"{TRAIN} --method maml --model net:two"),
    ),
    "an unknown device": (NOTHING, f"{TRAIN} --device gpu", "expected auto, (cpu)", NOTHING, f"{TRAIN} --device {{0}}"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the data set `birds`, a finished run `run` on it, and a module `net`."""
    folder = tmp_path_factory.mktemp("birds")
    write_birds(folder / "birds")
    text = "from torch import nn\ndef two(): return nn.Sequential(nn.Flatten(), nn.Linear(768, 2))\n"
    (folder / "net.py").write_text(text)
    with pytest.MonkeyPatch.context() as patch, torch.random.fork_rng():
        patch.chdir(folder)
        assert main([*TRAIN.split(), "--out", "run"]) == 0
    return folder


@pytest.fixture
def copied(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    shutil.copytree(place, tmp_path / "own")
    monkeypatch.chdir(tmp_path / "own")
    monkeypatch.syspath_prepend(tmp_path / "own")
    with torch.random.fork_rng():
        yield


def status_of(words: str) -> int | str | None:
    try:
        return main(shlex.split(words))
    except SystemExit as error:  # The parser's own.
        return error.code


@pytest.mark.sampled(2)
@pytest.mark.usefixtures("copied")
@pytest.mark.parametrize(("before", "command", "advice", "act", "then"), COMMANDS.values(), ids=COMMANDS)
def test_advice_of_the_command_line_works(
    before: Any, command: str, advice: str, act: Any, then: str, capsys: pytest.CaptureFixture[str]
) -> None:
    before()
    capsys.readouterr()
    assert status_of(command) == 2
    said = capsys.readouterr().err
    found = re.search(advice, said)
    assert found, said
    act()
    assert status_of(then.format(*found.groups())) == 0, capsys.readouterr().err


# --- errors of Python, and what each says to do -----------------------------------------------------------------------

X, Y, TX, TY = class_tasks((4,))
PIXELS = torch.arange(6 * 48).reshape(6, 1, 6, 8) / 500
LABELS = [0, 0, 1, 1, 2, 2]
SGD = lambda parameters: torch.optim.SGD(parameters, lr=0.1)


def maml(**keywords: Any) -> MAML:
    return MAML(seeded(NormedMlp), **{"inner_steps": 1, **keywords})


def frozen() -> MAML:
    learner = maml()
    learner.requires_grad_(False)
    return learner


def step(learner: Any, *batch: Any) -> Any:
    return learner.meta_step(batch or (X, Y, TX, TY))


def assign(name: str, learner: Any, value: Any) -> None:
    setattr(learner, name, value)
    step(learner)


def part(images: Tensor = PIXELS, **keywords: Any) -> ImageSet:
    return splits_from(images, LABELS, **keywords).train


def lazy(run: bool) -> nn.Module:
    model = nn.Sequential(nn.LazyLinear(3))
    if run:
        model(torch.zeros(1, 4))
    return model


def norm1d(**keywords: Any) -> nn.Module:
    return nn.Sequential(nn.Linear(4, 4), nn.InstanceNorm1d(4, **keywords), nn.Linear(4, 3))


def loaded(saved: Any, learner: Any) -> None:
    learner.load_state_dict(saved.state_dict())


SIZES = [(torch.zeros(1, size, size), number % 3) for number, size in enumerate((4, 5, 6, 4, 5, 6))]
STEP, COSINE = (lambda o: lr_scheduler.StepLR(o, 1)), (lambda o: lr_scheduler.CosineAnnealingLR(o, 9))
# The call; the advice; the call that follows it.
CALLS: dict[str, tuple[Callable[[], Any], str, Callable[[], Any]]] = {
    "labels of another dtype": (
        lambda: step(maml(), X, Y.int(), TX, TY),
        r"Pass support_y\.long\(\)",
        lambda: step(maml(), X, Y.int().long(), TX, TY),
    ),
    "inputs of another dtype": (
        lambda: step(maml(), X.float(), Y, TX.float(), TY),
        r"floats with task_batch\.to\(dtype\).*the model with learner\.to\(dtype\)",
        lambda: (
            maml().meta_step(TaskBatch.stacked(X.float(), Y, TX.float(), TY).to(torch.float64)),
            step(maml().to(torch.float32), X.float(), Y, TX.float(), TY),
        ),
    ),
    "whole numbers for floats": (
        lambda: step(maml(), X.long(), Y, TX.long(), TY),
        r"whole numbers with x\.to\(dtype\)",
        lambda: step(maml(), X.long().to(torch.float64), Y, TX.long().to(torch.float64), TY),
    ),
    "values that are not finite": (
        lambda: maml().evaluate((X / 0, Y, TX, TY)),
        r"torch\.nan_to_num",
        lambda: maml().evaluate((torch.nan_to_num(X / 0, 0, 1, -1), Y, TX, TY)),
    ),
    "evaluation mode": (lambda: step(maml().eval()), r"Call learner\.train\(\)", lambda: step(maml().eval().train())),
    "nothing to learn": (
        lambda: step(frozen()),
        r"learner\.model\.requires_grad_\(\)",
        lambda: (learner := frozen()).model.requires_grad_() and step(learner),
    ),
    "an optimizer that is no function": (
        lambda: maml(optimizer=SGD(seeded(NormedMlp).parameters())),
        r"lambda parameters: torch\.optim\.SGD\(parameters, lr=0\.1\)",
        lambda: maml(optimizer=SGD),
    ),
    "LBFGS": (
        lambda: maml(optimizer=torch.optim.LBFGS),
        "such as Adam or SGD",
        lambda: (maml(optimizer=torch.optim.Adam), maml(optimizer=SGD)),
    ),
    "an optimizer of other parameters": (
        lambda: assign("optimizer", maml(), SGD(seeded(NormedMlp).parameters())),
        r"build the optimizer from learner\.parameters\(\)",
        lambda: assign("optimizer", (learner := maml()), SGD(learner.parameters())),
    ),
    "a scheduler that is no function": (
        lambda: maml(scheduler=STEP(SGD(seeded(NormedMlp).parameters()))),
        r"lambda optimizer: torch\.optim\.lr_scheduler\.StepLR\(optimizer, 10\)",
        lambda: maml(scheduler=lambda optimizer: lr_scheduler.StepLR(optimizer, 10)),
    ),
    "a scheduler of another optimizer": (
        lambda: assign("scheduler", maml(), STEP(SGD(seeded(NormedMlp).parameters()))),
        r"Build it from learner\.optimizer",
        lambda: assign("scheduler", (learner := maml()), STEP(learner.optimizer)),
    ),
    "a scheduler that needs a metric": (
        lambda: maml(scheduler=lr_scheduler.ReduceLROnPlateau),
        r"Step others yourself on learner\.optimizer",
        lambda: lr_scheduler.ReduceLROnPlateau(maml().optimizer).step(0.5),
    ),
    "a state with another scheduler": (
        lambda: loaded(maml(scheduler=STEP), maml(scheduler=COSINE)),
        "Build it with the scheduler that it was trained with",
        lambda: loaded(maml(scheduler=STEP), maml(scheduler=STEP)),
    ),
    "the state of other arguments": (
        lambda: loaded(maml(learn_inner_lr=True, inner_steps=2), maml()),
        "build the learner with the method, model and arguments",
        lambda: loaded(maml(learn_inner_lr=True, inner_steps=2), maml(learn_inner_lr=True, inner_steps=2)),
    ),
    "the state of another method": (
        lambda: loaded(ProtoNet(seeded(NormedMlp)), maml()),
        "build the learner with the method, model and arguments",
        lambda: loaded(ProtoNet(seeded(NormedMlp)), ProtoNet(seeded(NormedMlp))),
    ),
    "four parts in a task batch": (
        lambda: TaskBatch((X, Y, TX, TY)),  # type: ignore[arg-type]
        r"written TaskBatch\.stacked\(support_x, support_y, target_x, target_y\)",
        lambda: TaskBatch.stacked(X, Y, TX, TY),
    ),
    "heads without a task's id": (
        lambda: step(maml(outputs={"head_init": "stored"})),
        r"a list of Task\(support_x, support_y, target_x, target_y, id=",
        lambda: maml(outputs={"head_init": "stored"}).meta_step([Task(X[0], Y[0], TX[0], TY[0], id=3)]),
    ),
    "a field without its group": (
        lambda: maml(workers=2),
        r'Did you mean execution=\{"workers": \.\.\.\}',
        lambda: maml(execution={"workers": 2}),
    ),
    "a misspelt keyword": (lambda: maml(norms="batch"), "Did you mean 'norm'", lambda: maml(norm="batch")),
    "a field of another rule": (
        lambda: maml(inner_update={"betas": (0.5, 0.9)}),
        'pass rule="adam"',
        lambda: maml(inner_update={"betas": (0.5, 0.9), "rule": "adam"}),
    ),
    "norms that are adapted and per step": (
        lambda: maml(adapt_norm=True, per_step_norm_affine=True),
        "Leave out per_step_norm_affine, or set adapt_norm=False",
        lambda: (maml(adapt_norm=True), maml(adapt_norm=False, per_step_norm_affine=True)),
    ),
    "a rate of no schedule": (
        lambda: maml(min_meta_lr=0.0005),
        "pass cosine_annealing=True",
        lambda: maml(min_meta_lr=0.0005, cosine_annealing=True),
    ),
    "a lazy module": (
        lambda: MAML(lazy(run=False)),
        "Run the model once on an example input",
        lambda: MAML(lazy(run=True)),
    ),
    "statistics of a norm": (
        lambda: MAML(norm1d(track_running_stats=True)),
        r"track_running_stats=False, or pass wrapping=\{'swap': \{InstanceNorm1d: your_factory\}\}",
        lambda: (
            MAML(norm1d(track_running_stats=False)),
            MAML(norm1d(track_running_stats=True), wrapping={"swap": {nn.InstanceNorm1d: lambda _: nn.Identity()}}),
        ),
    ),
    "steps without context": (
        lambda: MatchingNet(seeded(NormedMlp), processing_steps=3),
        "full_context=True",
        lambda: MatchingNet(seeded(NormedMlp), processing_steps=3, full_context=True),
    ),
    "a small memory": (
        lambda: step(MemoryModule(seeded(NormedMlp), slots=2)),
        "Raise slots=",
        lambda: step(MemoryModule(seeded(NormedMlp), slots=3)),
    ),
    "inputs that are no pixels": (
        lambda: step(NeuralStatistician(seeded(NormedMlp), likelihood="bernoulli")),
        "pass likelihood='gaussian'",
        lambda: step(NeuralStatistician(seeded(NormedMlp), likelihood="gaussian")),
    ),
    "a width of another module": (
        lambda: RelationNet(seeded(NormedMlp), relation=nn.Linear(6, 1), hidden=3),
        "Leave it out",
        lambda: RelationNet(seeded(NormedMlp), relation=nn.Linear(6, 1)),
    ),
    "float images": (
        lambda: LabelledImages(PIXELS, torch.tensor(LABELS), ("a", "b", "c")),
        r"Pass \(images \* 255\)\.round\(\)\.to\(torch\.uint8\)",
        lambda: LabelledImages((PIXELS * 255).round().to(torch.uint8), torch.tensor(LABELS), ("a", "b", "c")),
    ),
    "normalised images": (
        lambda: part(PIXELS * 2 - 1),
        "pass normalise= to EpisodeSampler",
        lambda: EpisodeSampler(part(), 1, normalise=([0.5], [0.5])),
    ),
    "images of whole numbers": (
        lambda: part((PIXELS * 255).long()),
        "Divide them by their white, or convert them to uint8",
        lambda: (part((PIXELS * 255).long() / 255), part((PIXELS * 255).long().to(torch.uint8))),
    ),
    "images of several sizes": (
        lambda: splits_from(SIZES),
        "Pass image_size=",
        lambda: splits_from(SIZES, image_size=4),
    ),
    "names without images": (
        lambda: LabelledImages(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 2]), ("a", "b", "c", "d")),
        "2 classes have no image: 'b', 'd'|they run from",
        lambda: LabelledImages(torch.zeros(2, 1, 4, 4, dtype=torch.uint8), torch.tensor([0, 1]), ("a", "c")),
    ),
    "workers for images in memory": (
        lambda: EpisodeSampler(part(), 1, workers=1),
        "Leave it out, or stream the images",
        lambda: (EpisodeSampler(part(), 1), EpisodeSampler(part(stream=True), 1, workers=1)),
    ),
    "turns of images that are not square": (
        lambda: EpisodeSampler(part(), 1, rotations=True),
        "Pass rotations=False",
        lambda: EpisodeSampler(part(), 1, rotations=False),
    ),
}


@pytest.mark.parametrize(("call", "advice", "then"), CALLS.values(), ids=CALLS)
def test_advice_of_a_python_error_works(call: Any, advice: str, then: Any) -> None:
    with pytest.raises((MetaWrapError, TypeError), match=advice):  # A TypeError for a keyword, as Python's own.
        call()
    then()
