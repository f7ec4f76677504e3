"""What `adapt` and `unwrap` return is the user's own class and nothing else, and a deployment can do with it what it
does with any module: pickle, copy, save, load, export, trace, compile, cast, train on."""

from __future__ import annotations

import copy
import gc
import io
import math
import os
import pickle
import subprocess
import sys
import types
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache, partial
from pathlib import Path
from typing import Any

import deployed_models as deployed
import pytest
import torch
import torch.nn.functional as F
import torchvision
from engine_cases import POLICIES, vision_transformer
from face import assert_same_values, build, fingerprint
from keywords import grouped
from models import ActNormNet, Conv4, LSTMClassifier, NormedMlp, TiedNet, class_tasks, hooked_conv4, seeded
from steady import steady
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm
from torch.nn.utils import parametrize, prune

from metawrap import MAMLPlusPlus
from metawrap.tasks import map_tensors, tensors_in

STEPS = 2
ASKED = (None, 0, 1, STEPS + 3)
"""`steps=` of adapt: as in training, none, fewer, more."""


@dataclass(frozen=True)
class Case:
    """A network that is wrapped, and the tasks for it.

    make: the network; `wrapper` goes around it before it is handed to metawrap.
    """

    make: Callable[[], nn.Module]
    shape: tuple[int, ...] | str = (4,)
    options: dict[str, Any] = field(default_factory=dict, hash=False)
    wrapper: Callable[[nn.Module], nn.Module] | None = None
    higher: bool = True

    def original(self) -> nn.Module:
        return seeded(self.make).eval()

    def batch(self) -> tuple[Any, Tensor, Any, Tensor]:
        if self.shape == "words":
            generator = torch.Generator().manual_seed(0)
            words = [torch.randint(0, 9, (2, count, 5), generator=generator) for count in (6, 9)]
            return words[0], torch.arange(3).repeat(2, 2), words[1], torch.arange(3).repeat(2, 3)
        if self.shape == "keywords":
            left, y, target_left, target_y = class_tasks((2,), shots=2)
            right, _, target_right, _ = class_tasks((3,), shots=2, seed=1)
            return {"left": left, "right": right}, y, {"left": target_left, "right": target_right}, target_y
        return class_tasks(self.shape, shots=2)  # type: ignore[arg-type]

    def task(self) -> tuple[Any, Tensor, Any, Tensor]:
        """support_x, support_y, target_x, target_y of the first task of the batch."""
        return tuple(map_tensors(part, lambda tensor: tensor[0]) for part in self.batch())  # type: ignore[return-value]

    @property
    def loss(self) -> Callable[[Any, Tensor], Tensor]:
        return self.options.get("loss_fn", F.cross_entropy)


def small_images(make: Callable[..., nn.Module]) -> Callable[[], nn.Module]:
    return lambda: steady(make(num_classes=3))


FIRST_ORDER = {"first_order_epochs": math.inf}  # torch has no second derivative of an embedding bag
CASES: dict[str, Case] = {
    "Conv4": Case(partial(Conv4, blocks=2, size=8), (1, 8, 8)),
    "strided Conv4": Case(partial(Conv4, strided=True), (1, 16, 16)),
    "norm with activation": Case(ActNormNet, (1, 6, 6)),
    "hooks": Case(partial(hooked_conv4, blocks=3, size=8), (1, 8, 8)),
    "tied": Case(TiedNet, (6,)),
    "LSTM": Case(LSTMClassifier, (4, 3)),
    "vision transformer": Case(vision_transformer, (3, 16, 16)),
    "transformer encoder": Case(deployed.Encoder, (5, 8)),
    "legacy weight norm": Case(deployed.weight_normed),
    "parametrized": Case(deployed.parametrized, higher=False),
    "parametrized norm": Case(deployed.parametrized_norm, higher=False),
    "pruned": Case(deployed.pruned),
    "SyncBatchNorm": Case(deployed.synchronised, (1, 8, 8)),
    "frozen backbone": Case(deployed.frozen_backbone, (1, 8, 8), {"keep_norm": "conv0.norm"}),
    "kinds of norm": Case(deployed.NormKinds),
    "embedding bag": Case(deployed.Bag, "words", FIRST_ORDER),
    "sparse embedding": Case(deployed.SparseWords, "words"),
    "dict out": Case(deployed.KeywordNet, "keywords", {"loss_fn": deployed.logits}),
    "dataclass out": Case(deployed.KeywordNetWithDataclass, "keywords", {"loss_fn": deployed.logits}),
    "bound method": Case(deployed.BoundMethod, higher=False),
    "closure": Case(deployed.Closure, higher=False),
    "closures in containers": Case(deployed.ClosuresInContainers, higher=False),
    "metaclass": Case(deployed.Registered, higher=False),
    "complex": Case(deployed.ComplexNet),
    "parameter collections": Case(deployed.Collections),
    "keeps its last output": Case(deployed.KeepsOutput),
    "norm parameters for all steps": Case(NormedMlp, options={"per_step_norm_affine": False, "adapt_norm": True}),
    "one row of statistics": Case(NormedMlp, options={"per_step_norm_statistics": False}),
    "DataParallel": Case(NormedMlp, wrapper=nn.DataParallel),
    "compiled": Case(NormedMlp, wrapper=partial(torch.compile, backend="eager")),
}
LARGE: dict[str, Case] = {
    "resnet18": Case(small_images(torchvision.models.resnet18), (3, 32, 32), {"inner_lr": 0.01}),
    "mobilenet_v3_small": Case(small_images(torchvision.models.mobilenet_v3_small), (3, 32, 32), {"inner_lr": 0.01}),
}
EVERY = [*CASES, *(pytest.param(name, marks=pytest.mark.slow) for name in LARGE)]
ALL = CASES | LARGE


@cache
def wrapped(name: str, norm: str, engine: str = "functional") -> tuple[nn.Module, Any]:
    """The module that was handed to metawrap, and its learner; no test changes either."""
    case = ALL[name]
    model = seeded(case.make)
    handed = model if case.wrapper is None else case.wrapper(model)
    options = {"inner_steps": STEPS, "norm": norm, "engine": engine, "first_order_epochs": 0} | case.options
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # first order throughout leaves norm rows without a gradient; none is trained
        return model, build(handed, **options)


@cache
def returned(name: str, norm: str) -> dict[str, nn.Module]:
    """Every module that a learner gives out."""
    _, learner = wrapped(name, norm)
    support_x, support_y, _, _ = ALL[name].task()
    adapted = {f"adapt({steps})": learner.adapt(support_x, support_y, steps=steps) for steps in ASKED}
    return adapted | {"unwrap": learner.unwrap()}


def call(model: Any, x: Any) -> Any:
    return model(**x) if isinstance(x, dict) else model(x)


def assert_same_output(found: Any, expected: Any, tolerance: float = 1e-9) -> None:
    assert type(found) is type(expected)
    assert_same_values(tensors_in(found), tensors_in(expected), tolerance)


# --- values: plain PyTorch on an ordinary module ---------------------------------------------------------------------


def by_hand(name: str, norm: str, steps: int) -> Any:
    """The target prediction of MAML++ as one would write it without any library: a fresh original, and a loop of SGD.

    Of the learner only the values are read: initial weights, rates, norm rows.
    """
    case, (_, learner) = ALL[name], wrapped(name, norm)
    support_x, support_y, target_x, _ = case.task()
    model = case.original()
    norms = {
        path: module
        for path, module in model.named_modules()
        if isinstance(module, _BatchNorm) and path != case.options.get("keep_norm")
    }
    own = dict(model.named_parameters())
    values = dict(learner.model.named_parameters()) | dict(learner.model.named_buffers())

    def put(row: int) -> None:
        """The norms' own tensors, at a row; a norm that runs on its batch stands in training mode."""
        for path, module in norms.items():
            for local, tensor in module.state_dict().items():
                value = values[f"{path}.{local}"].detach()
                if f"{path}.{local}" not in learner.learning_rates:
                    tensor.copy_(value[row] if value.dim() > tensor.dim() else value)

    def by_batch(on: bool) -> None:
        for module in norms.values():
            module.train(on)

    for path, tensor in model.state_dict().items():
        if path in values and tensor.shape == values[path].shape:  # tied ones have one name there
            tensor.copy_(values[path].detach())
    for step in range(steps):
        row = min(step, STEPS - 1)
        put(row)
        by_batch(norm != "running")
        loss = case.loss(call(model, support_x), support_y)
        rates = {path: learner.learning_rates[path].detach()[row] for path in learner.learning_rates}
        gradients = torch.autograd.grad(loss, [own[path] for path in rates])
        for (path, rate), gradient in zip(rates.items(), gradients, strict=True):
            own[path].data.sub_(rate * (gradient.to_dense() if gradient.is_sparse else gradient))
    put(max(0, min(steps, STEPS) - 1))
    by_batch(norm == "batch")
    if norm == "support":
        by_batch(True)
        seen: dict[str, tuple[Tensor, Tensor]] = {}

        def watch(path: str) -> Callable[..., None]:
            def moments(module: nn.Module, args: tuple[Tensor, ...]) -> None:
                over = [axis for axis in range(args[0].dim()) if axis != 1]
                seen[path] = args[0].mean(over), args[0].var(over, correction=0)

            return moments

        handles = [module.register_forward_pre_hook(watch(path)) for path, module in norms.items()]
        with torch.no_grad():
            call(model, support_x)
        for handle in handles:
            handle.remove()
        by_batch(False)
        for path, (mean, variance) in seen.items():
            norms[path].track_running_stats = True
            norms[path].running_mean, norms[path].running_var = mean, variance
    with torch.no_grad():
        return call(model, target_x)


@pytest.mark.parametrize(
    ("norm", "engine"),
    [
        *[(norm, "functional") for norm in POLICIES],
        ("support", "higher"),
        pytest.param("batch", "higher", marks=pytest.mark.slow),
        pytest.param("running", "higher", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize("name", EVERY)
def test_output_is_the_learners_own_prediction_and_that_of_plain_pytorch(name: str, norm: str, engine: str) -> None:
    case = ALL[name]
    if engine == "higher" and not case.higher:
        pytest.skip("refused: see test_surgery")
    _, learner = wrapped(name, norm, engine)
    support_x, support_y, target_x, target_y = case.task()
    for steps in ASKED:
        adapted = learner.adapt(support_x, support_y, steps=steps)
        expected = by_hand(name, norm, STEPS if steps is None else steps)
        told = learner.evaluate([(support_x, support_y, target_x, target_y)], steps=steps, keep_predictions=True)
        with torch.no_grad():
            fused = call(adapted, target_x)
        for found in (call(adapted, target_x), fused, told.predictions[0]):
            assert_same_output(found, expected)
    before = fingerprint(learner)
    learner.eval()
    told = learner([(support_x, support_y, target_x, target_y)])
    learner.train()
    assert_same_output(told.predictions[0], by_hand(name, norm, STEPS))
    assert fingerprint(learner) == before
    # What is unwrapped holds stored statistics, not those of a support set.
    plain = learner.unwrap().eval()
    assert_same_output(call(plain, target_x), by_hand(name, "running" if norm == "support" else norm, 0))


# --- structure: the user's own and nothing else ----------------------------------------------------------------------


def reachable(module: nn.Module) -> Iterator[Any]:
    """Every object that hangs on a module, closures and hooks included; not what classes and Python modules hold."""
    seen: set[int] = set()
    todo: list[Any] = [module]
    while todo:
        value = todo.pop()
        if id(value) in seen or isinstance(value, type | types.ModuleType | types.CodeType):
            continue
        seen.add(id(value))
        yield value
        if isinstance(value, types.FunctionType):
            todo += [value.__closure__, value.__defaults__, value.__kwdefaults__, value.__dict__]
        else:
            todo += gc.get_referents(value)


def memory_of(module: nn.Module) -> set[int]:
    tensors = [value for value in reachable(module) if isinstance(value, Tensor)]
    return {tensor.untyped_storage().data_ptr() for tensor in tensors if tensor.numel()}


def class_of(module: nn.Module) -> tuple[Any, ...]:
    """The class; for a parametrized module, whose class torch makes anew for each, its name and bases."""
    cls = type(module)
    return (cls.__name__, cls.__bases__) if parametrize.is_parametrized(module) else (cls,)


@pytest.mark.parametrize("norm", POLICIES)
@pytest.mark.parametrize("name", EVERY)
def test_returned_module_is_of_the_users_classes_and_shares_nothing(name: str, norm: str) -> None:
    model, learner = wrapped(name, norm)
    modules = returned(name, norm)
    # Looked at when all have been made: memory that is freed in between may be taken again.
    taken = memory_of(model) | memory_of(learner)
    original = ALL[name].original()
    structure = [(path, class_of(part)) for path, part in original.named_modules(remove_duplicate=False)]
    parameters = [
        (path, type(p), p.shape, p.dtype, p.requires_grad)
        for path, p in original.named_parameters(remove_duplicate=False)
    ]
    attributes = {path: set(vars(part)) for path, part in model.named_modules()}
    for made, plain in modules.items():
        assert structure == [(path, class_of(part)) for path, part in plain.named_modules(remove_duplicate=False)]
        assert parameters == [
            (path, type(p), p.shape, p.dtype, p.requires_grad)
            for path, p in plain.named_parameters(remove_duplicate=False)
        ]
        assert all(p.grad is None and p.is_leaf and not p.is_inference() for p in plain.parameters())
        tensors = [*plain.parameters(), *plain.buffers()]
        assert all(tensor.untyped_storage().nbytes() == tensor.nbytes for tensor in tensors)  # no row of a larger one
        assert {path: set(vars(part)) for path, part in plain.named_modules()} == attributes
        assert not [part for part in plain.modules() if part.training] or made == "unwrap"
        owners = {getattr(type(value), "__module__", None) or "" for value in reachable(plain)}
        assert not [owner for owner in owners if owner.split(".")[0] in ("metawrap", "higher")]
        functions = [value for value in reachable(plain) if isinstance(value, types.FunctionType)]
        assert not [function for function in functions if (function.__module__ or "").startswith("metawrap")]
        assert not memory_of(plain) & taken, made
        taken |= memory_of(plain)


def test_the_tests_own_search_finds_what_is_hidden() -> None:
    model = seeded(deployed.ClosuresInContainers)
    copied = copy.deepcopy(model)  # leaves the closures on the original
    assert memory_of(copied) & memory_of(model)
    learner = build(seeded(NormedMlp))
    assert "metawrap" in {type(value).__module__.split(".")[0] for value in reachable(learner.model)}


@pytest.mark.parametrize("norm", POLICIES)
def test_mode_is_that_of_the_learner_for_unwrap_and_eval_for_adapt(norm: str) -> None:
    learner = build(seeded(Conv4), norm=norm, keep_norm="conv0.norm")
    support_x, support_y, _, _ = class_tasks((1, 16, 16), shots=2)
    for mode in (True, False):
        learner.train(mode)
        plain = learner.unwrap()
        assert {part.training for path, part in plain.named_modules() if path != "conv0.norm"} == {mode}
        assert not plain.conv0.norm.training  # kept norms run on what they have stored
        assert not any(part.training for part in learner.adapt(support_x[0], support_y[0]).modules())


# --- pickle, copy, state_dict ----------------------------------------------------------------------------------------


def outcome(action: Callable[[], Any]) -> str:
    """ "works", or the class and text of what was raised."""
    try:
        action()
    except Exception as error:
        return f"{type(error).__name__}: {error}"
    return "works"


NOT_PICKLED = {
    "parametrized": "Serialization of parametrized modules is only",
    "parametrized norm": "Serialization of parametrized modules is only",
    "closure": "lambda",
    "closures in containers": "lambda",
}
"""Networks that do not pickle, wrapped or not, and what Python says."""

FRESH_PROCESS = """
import pickle, sys
sys.modules["metawrap"] = None  # from here on, importing it is an error
sys.modules["higher"] = None
import torch
from torch import Tensor
torch.set_num_threads(1)
for name, made, x, expected in pickle.load(open(sys.argv[1], "rb")):
    model = pickle.loads(made)
    output = (model(**x) if isinstance(x, dict) else model(x))
    values = output if isinstance(output, dict) else getattr(output, "__dict__", None) or {"": output}
    for value, wanted in zip(values.values(), expected, strict=True):
        torch.testing.assert_close(value.detach(), wanted, rtol=1e-12, atol=1e-12)
    print(name)
"""


def unpickled_elsewhere(tmp_path: Path, names: list[str], asked: tuple[str, ...]) -> None:
    jobs = []
    for name in names:
        target_x = ALL[name].task()[2]
        for norm in POLICIES:
            for made in asked:
                plain = copy.deepcopy(returned(name, norm)[made]).eval()
                pickled = pickle.dumps(plain)
                expected = [tensor.detach() for tensor in tensors_in(call(plain, target_x))]
                jobs.append((f"{name}, {norm}, {made}", pickled, target_x, expected))
    path = tmp_path / "jobs.pickle"
    path.write_bytes(pickle.dumps(jobs))
    environment = os.environ | {"PYTHONPATH": str(Path(__file__).parents[1] / "support"), "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-c", FRESH_PROCESS, str(path)]
    done = subprocess.run(command, env=environment, cwd=tmp_path, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines() == [job[0] for job in jobs]


def test_pickles_load_and_predict_in_a_process_without_metawrap(tmp_path: Path) -> None:
    unpickled_elsewhere(tmp_path, [name for name in CASES if name not in NOT_PICKLED], ("adapt(None)", "unwrap"))


@pytest.mark.slow
def test_large_pickles_load_and_predict_in_a_process_without_metawrap(tmp_path: Path) -> None:
    unpickled_elsewhere(tmp_path, list(LARGE), ("adapt(None)", "adapt(0)", "unwrap"))


@pytest.mark.parametrize("name", CASES)
def test_pickle_works_exactly_where_the_original_pickles(name: str) -> None:
    original = ALL[name].original()
    said = NOT_PICKLED.get(name, "works")
    assert said in outcome(lambda: pickle.dumps(original))
    for plain in returned(name, "support").values():
        assert said in outcome(lambda made=plain: pickle.dumps(made))
        assert said in outcome(lambda made=plain: torch.save(made, io.BytesIO()))
    with torch.no_grad():
        plain = returned(name, "support")["adapt(None)"]
        call(plain, ALL[name].task()[2])
    assert said in outcome(lambda: pickle.dumps(plain))


@pytest.mark.parametrize("norm", POLICIES)
@pytest.mark.parametrize("name", [name for name in CASES if "closure" not in name])
def test_deepcopy_predicts_the_same_and_stands_alone(name: str, norm: str) -> None:
    target_x = ALL[name].task()[2]
    for plain in returned(name, norm).values():
        copied = copy.deepcopy(plain)
        assert not memory_of(copied) & memory_of(plain)
        with torch.no_grad():
            assert_same_output(call(copied.eval(), target_x), call(copy.deepcopy(plain).eval(), target_x), 0)


def without_statistics(model: nn.Module, kept: Any = None) -> nn.Module:
    """What a user does to a fresh original to take the weights of a module that was adapted under norm="batch"."""
    for path, module in model.named_modules():
        if isinstance(module, _BatchNorm) and path != kept:
            module.track_running_stats = False
            module.running_mean = module.running_var = module.num_batches_tracked = None
    return model


@pytest.mark.parametrize("norm", POLICIES)
@pytest.mark.parametrize("name", EVERY)
def test_state_dict_goes_through_a_file_into_a_fresh_original(name: str, norm: str) -> None:
    case = ALL[name]
    target_x = case.task()[2]
    for made, plain in returned(name, norm).items():
        plain = copy.deepcopy(plain).eval() if "closure" not in name else plain.eval()
        file = io.BytesIO()
        torch.save(plain.state_dict(), file)
        file.seek(0)
        state = torch.load(file, weights_only=True)
        fresh = case.original()
        if norm == "batch":
            # Loud: loaded without a word, a fresh norm would normalise by mean 0 and variance 1.
            said = outcome(lambda fresh=fresh, state=state: fresh.load_state_dict(state))
            lost = set(fresh.state_dict()) - set(plain.state_dict())
            assert said == "works" if not lost else "Missing key(s)" in said
            assert all(f'"{key}"' in said for key in lost)
            assert all(key.endswith(("running_mean", "running_var", "num_batches_tracked")) for key in lost)
            assert bool(lost) == any(isinstance(m, _BatchNorm) for m in fresh.modules())
            fresh = without_statistics(case.original(), case.options.get("keep_norm"))
        elif name == "kinds of norm" and norm == "support" and made != "unwrap":
            # The user's norm kept no statistics, and now has to.
            assert '"stateless.running_mean"' in outcome(lambda fresh=fresh, state=state: fresh.load_state_dict(state))
            fresh.stateless = nn.BatchNorm1d(6).double().eval()
        fresh.load_state_dict(state)
        assert_same_output(call(fresh, target_x), call(plain, target_x), 0)


@pytest.mark.parametrize("norm", POLICIES)
@pytest.mark.parametrize("name", ["Conv4", "LSTM", "parametrized", "kinds of norm", "complex"])
def test_the_learners_state_in_a_new_learner_adapts_alike(name: str, norm: str) -> None:
    case, (_, learner) = ALL[name], wrapped(name, norm)
    support_x, support_y, target_x, _ = case.task()
    file = io.BytesIO()
    torch.save(learner.state_dict(), file)
    file.seek(0)
    options = {"inner_steps": STEPS, "norm": norm, "engine": "functional", "first_order_epochs": 0} | case.options
    again = MAMLPlusPlus(seeded(case.make, seed=7), **grouped(**options))
    again.load_state_dict(torch.load(file, weights_only=True))
    for plain, expected in (
        (again.adapt(support_x, support_y), learner.adapt(support_x, support_y)),
        (again.unwrap().eval(), learner.unwrap().eval()),
    ):
        assert_same_output(call(plain, target_x), call(expected, target_x), 0)


# --- export ----------------------------------------------------------------------------------------------------------

torch.export.register_dataclass(deployed.Output)  # torch exports no dataclass that it was not told of


def exported(model: nn.Module, x: Any, **options: Any) -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # recurrent layers set attributes while they are traced, as the original does
        if isinstance(x, dict):
            return torch.export.export(model, (), x, **options).module()
        return torch.export.export(model, (x,), **options).module()


@cache
def exports(name: str) -> bool:
    original, target_x = ALL[name].original(), ALL[name].task()[2]
    assert_same_output(call(exported(original, target_x), target_x), call(original, target_x))
    return True


def assert_exports(name: str, norm: str, chosen: tuple[str, ...]) -> None:
    target_x = ALL[name].task()[2]
    assert exports(name)  # no network here is one that torch could not export in the first place
    for made in chosen:
        plain = returned(name, norm)[made].eval()
        expected = call(plain, target_x)
        assert_same_output(call(exported(plain, target_x), target_x), expected)
        assert_same_output(call(plain, target_x), expected, 0)


@pytest.mark.parametrize("norm", ["batch", "support"])
@pytest.mark.parametrize("name", EVERY)
def test_adapted_module_exports_as_the_original_does(name: str, norm: str) -> None:
    assert_exports(name, norm, ("adapt(None)",))


@pytest.mark.slow
@pytest.mark.parametrize("norm", POLICIES)
@pytest.mark.parametrize("name", ALL)
def test_every_returned_module_exports_as_the_original_does(name: str, norm: str) -> None:
    assert_exports(name, norm, tuple(returned(name, norm)))


SIZES = (2, 5, 12)


@pytest.mark.parametrize("norm", POLICIES)
@pytest.mark.parametrize("name", ["Conv4", "strided Conv4", "metaclass", "kinds of norm"])
def test_export_with_any_batch_size_equals_eager_and_keeps_the_policys_company_rule(name: str, norm: str) -> None:
    plain = returned(name, norm)["adapt(None)"]
    target_x = ALL[name].task()[2]
    x = torch.cat([target_x, 2 * target_x])
    batch = torch.export.Dim("batch", min=2)
    shapes: Any = ({0: batch},)
    program = exported(plain, target_x, dynamic_shapes=shapes)
    with torch.no_grad():
        outputs = {size: program(x[:size]) for size in SIZES}
        for size, output in outputs.items():
            assert_same_values([output], [plain(x[:size])])
    alone = torch.allclose(outputs[12][:2], outputs[2], rtol=1e-9, atol=1e-11)
    # Under "batch" the module, exported or not, normalises by whatever batch it is given.
    transductive = norm == "batch" or (norm == "running" and name == "kinds of norm")  # one of them stores nothing
    assert alone == (not transductive)
    if not transductive:
        single = exported(plain, target_x[:1])
        assert_same_values([single(target_x[:1])], [plain(target_x)[:1]])


def test_exported_program_is_saved_and_loaded() -> None:
    plain = returned("Conv4", "support")["adapt(None)"]
    target_x = ALL["Conv4"].task()[2]
    file = io.BytesIO()
    torch.export.save(torch.export.export(plain, (target_x,)), file)
    file.seek(0)
    assert_same_values([torch.export.load(file).module()(target_x)], [plain(target_x)])


WITHOUT_SCRIPT = {"strided Conv4", "frozen backbone"}
"""Networks whose original TorchScript does not take."""


@pytest.mark.parametrize("norm", POLICIES)
@pytest.mark.parametrize(
    "name",
    [
        "strided Conv4",
        "norm with activation",
        "metaclass",
        "frozen backbone",
        pytest.param("LSTM", marks=pytest.mark.slow),
        pytest.param("transformer encoder", marks=pytest.mark.slow),
    ],
)
def test_tracing_scripting_and_compiling_keep_the_output(name: str, norm: str) -> None:
    target_x = ALL[name].task()[2]
    other_x = torch.cat([target_x, 1 - target_x[:3]])
    plain = copy.deepcopy(returned(name, norm)["adapt(None)"])
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and still what many deploy with
        ways = {"trace": lambda: torch.jit.trace(plain, (target_x,))}
        if outcome(lambda: torch.jit.script(ALL[name].original())) == "works":
            ways["script"] = lambda: torch.jit.script(plain)
        if outcome(lambda: torch.jit.freeze(torch.jit.script(ALL[name].original()))) == "works":
            ways["freeze"] = lambda: torch.jit.freeze(torch.jit.script(plain))
        ways["compile"] = lambda: torch.compile(plain, backend="eager", fullgraph=name != "LSTM")
        assert len(ways) == 2 if name in WITHOUT_SCRIPT else len(ways) == 4
        for way in ways.values():
            made = way()
            for x in (target_x, other_x):
                assert_same_values([made(x)], [plain(x)])
    torch.compiler.reset()


# --- what one does with a module -------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", POLICIES)
@pytest.mark.parametrize("name", ["Conv4", "metaclass", "transformer encoder", "kinds of norm", "LSTM"])
def test_adapted_module_can_be_cast(name: str, norm: str, dtype: torch.dtype) -> None:
    target_x = ALL[name].task()[2]
    plain = returned(name, norm)["adapt(None)"]
    cast = copy.deepcopy(plain).to(dtype)
    assert {p.dtype for p in cast.parameters()} == {dtype}
    with torch.no_grad():
        found, expected = cast(target_x.to(dtype)), plain(target_x)
    assert found.dtype == dtype
    tolerance = {torch.float32: 1e-4, torch.float16: 0.05, torch.bfloat16: 0.3}[dtype]
    torch.testing.assert_close(found.double(), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("affine", [True, False])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("norm", POLICIES)
def test_a_model_in_half_precision_adapts_and_evaluates_in_it(norm: str, dtype: torch.dtype, affine: bool) -> None:
    model = seeded(NormedMlp)
    model.norm = nn.BatchNorm1d(6, affine=affine).double()
    support_x, support_y, target_x, target_y = (part[0] for part in class_tasks((4,), shots=2))
    full = MAMLPlusPlus(copy.deepcopy(model), inner_steps=2, norm=norm)  # type: ignore[arg-type]
    half = MAMLPlusPlus(copy.deepcopy(model).to(dtype), inner_steps=2, norm=norm)  # type: ignore[arg-type]
    adapted = half.adapt(support_x.to(dtype), support_y)
    tensors = [*adapted.parameters(), *adapted.buffers()]
    assert {tensor.dtype for tensor in tensors if tensor.is_floating_point()} == {dtype}
    task = (support_x.to(dtype), support_y, target_x.to(dtype), target_y)
    told = half.evaluate([task], keep_predictions=True).predictions[0]
    expected = full.adapt(support_x, support_y)(target_x).detach()
    for found in (adapted(target_x.to(dtype)), told):
        assert found.dtype == dtype
        torch.testing.assert_close(found.detach().double(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("norm", POLICIES)
def test_fine_tuning_with_a_plain_optimizer_moves_the_module_alone(norm: str) -> None:
    case, (model, learner) = ALL["frozen backbone"], wrapped("frozen backbone", norm)
    support_x, support_y, target_x, target_y = case.task()
    before = fingerprint(model), fingerprint(learner)
    adapted = learner.adapt(support_x, support_y)
    start = {path: p.detach().clone() for path, p in adapted.named_parameters()}
    optimizer = torch.optim.SGD(adapted.parameters(), lr=0.1)
    losses = []
    for _ in range(5):
        optimizer.zero_grad()
        loss = F.cross_entropy(adapted(target_x), target_y)
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    assert losses[-1] < losses[0]
    moved = {path for path, p in adapted.named_parameters() if not torch.equal(p, start[path])}
    assert moved == {path for path, _ in model.named_parameters() if not path.startswith("conv0.")}
    assert (fingerprint(model), fingerprint(learner)) == before


@pytest.mark.parametrize("norm", POLICIES)
def test_in_training_mode_the_norms_are_torchs_own(norm: str) -> None:
    _, learner = wrapped("metaclass", norm)
    support_x, support_y, target_x, _ = ALL["metaclass"].task()
    adapted = learner.adapt(support_x, support_y)
    by_eval, before = adapted(target_x).detach(), copy.deepcopy(adapted.norm.state_dict())
    hidden = adapted.first(target_x).detach()
    normalised = (hidden - hidden.mean(0)) / torch.sqrt(hidden.var(0, correction=0) + adapted.norm.eps)
    expected = adapted.linear(torch.tanh(normalised * adapted.norm.weight + adapted.norm.bias))
    rows = copy.deepcopy(dict(learner.model.norm.named_buffers()))
    assert_same_values([adapted.train()(target_x)], [expected])
    if norm == "batch":
        assert_same_values([by_eval], [expected])
        assert set(adapted.norm.state_dict()) == {"weight", "bias"}
    else:
        mean = 0.9 * before["running_mean"] + 0.1 * hidden.mean(0)
        variance = 0.9 * before["running_var"] + 0.1 * hidden.var(0, correction=1)
        assert_same_values([adapted.norm.running_mean, adapted.norm.running_var], [mean, variance])
        assert int(adapted.norm.num_batches_tracked) == int(before["num_batches_tracked"]) + 1
    assert all(torch.equal(value, rows[path]) for path, value in learner.model.norm.named_buffers())


REMOVED: dict[str, Callable[[nn.Module], Any]] = {
    "parametrized": lambda module: parametrize.remove_parametrizations(module.first, "weight"),
    "parametrized norm": lambda module: parametrize.remove_parametrizations(module.norm, "weight"),
    "pruned": lambda module: prune.remove(module.first, "weight"),
    "legacy weight norm": lambda module: nn.utils.remove_weight_norm(module.first),
}


@pytest.mark.parametrize("norm", POLICIES)
@pytest.mark.parametrize("name", REMOVED)
def test_what_reparametrizes_can_be_removed_before_deployment(name: str, norm: str) -> None:
    model, learner = wrapped(name, norm)
    support_x, support_y, target_x, _ = ALL[name].task()
    before = fingerprint(model), fingerprint(learner)
    expected = by_hand(name, norm, STEPS)
    first, second = (learner.adapt(support_x, support_y) for _ in range(2))
    REMOVED[name](first)
    assert_same_values([first(target_x)], [expected])
    assert {type(part) for part in first.modules()} == {type(part) for part in NormedMlp().modules()}
    # All the others, which torch's own copies would share a class with, are what they were.
    assert (fingerprint(model), fingerprint(learner)) == before
    assert_same_values([second(target_x)], [expected])
    model(target_x)
    assert_same_values([learner.adapt(support_x, support_y)(target_x)], [expected])
    original = ALL[name].original()
    REMOVED[name](original)
    assert outcome(lambda: pickle.dumps(first)) == outcome(lambda: pickle.dumps(original))


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
@pytest.mark.parametrize("norm", POLICIES)
def test_what_is_returned_inside_inference_mode_trains_outside(norm: str, mode: Any) -> None:
    _, learner = wrapped("LSTM", norm)
    support_x, support_y, target_x, target_y = ALL["LSTM"].task()
    with mode():
        made = [learner.adapt(support_x, support_y), learner.unwrap()]
    for plain in made:
        assert not any(tensor.is_inference() for tensor in [*plain.parameters(), *plain.buffers()])
        F.cross_entropy(plain(target_x), target_y).backward()
        assert all(parameter.grad is not None for parameter in plain.parameters())


def test_recurrent_layers_hold_no_weights_but_their_own() -> None:
    for plain in returned("LSTM", "support").values():
        held = plain.lstm._flat_weights
        assert all(a is b for a, b in zip(held, plain.lstm.parameters(), strict=True))


class ClosureOverBuffer(NormedMlp):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("scale", torch.linspace(0.5, 1.5, 6))
        scale = self.scale
        self.between = lambda x: torch.tanh(x) * scale

    def forward(self, x: Tensor) -> Tensor:
        return self.linear(self.between(self.norm(self.first(x))))


def test_closure_over_a_buffer_reads_the_copys() -> None:
    model = ClosureOverBuffer()
    learner = MAMLPlusPlus(model, inner_steps=1)
    support_x, support_y, target_x, _ = (part[0] for part in class_tasks((4,), shots=2))
    plain = learner.adapt(support_x.float(), support_y)
    assert not memory_of(plain) & (memory_of(model) | memory_of(learner))
    before = plain(target_x.float())
    with torch.no_grad():
        model.scale.zero_()
        learner.model.scale.zero_()
    assert torch.equal(plain(target_x.float()), before)
    with torch.no_grad():
        plain.scale.mul_(0)
    assert not torch.equal(plain(target_x.float()), before)


def test_adapting_again_leaves_what_was_returned_before() -> None:
    learner = build(seeded(NormedMlp), norm="support")
    batch = class_tasks((4,), shots=2)
    first = learner.adapt(batch[0][0], batch[1][0])
    before = fingerprint(first)
    learner.adapt(batch[0][1], batch[1][1])
    learner.meta_step(batch)
    assert fingerprint(first) == before
