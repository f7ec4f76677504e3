"""Modules that `adapt` and `unwrap` return go through pickle, copy, state_dict, export, trace and compile."""

from __future__ import annotations

import copy
import io
import os
import pickle
import subprocess
import sys
import warnings
from functools import cache
from pathlib import Path
from typing import Any

import deployed_models as deployed
import pytest
import torch
from deployed_cases import (
    ALL,
    CASES,
    LARGE,
    STEPS,
    assert_same_output,
    call,
    memory_of,
    outcome,
    policy_cases,
    returned,
    wrapped,
)
from engine_cases import PLAIN_POLICIES
from face import assert_same_values
from keywords import grouped
from models import seeded
from torch import nn
from torch.nn.modules.batchnorm import _BatchNorm

from metawrap import MAMLPlusPlus
from metawrap.tasks import tensors_in

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
        for norm in PLAIN_POLICIES:
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


@pytest.mark.slow
def test_pickles_load_and_predict_in_a_process_without_metawrap(tmp_path: Path) -> None:
    unpickled_elsewhere(tmp_path, [name for name in CASES if name not in NOT_PICKLED], ("adapt(None)", "unwrap"))


@pytest.mark.slow
def test_large_pickles_load_and_predict_in_a_process_without_metawrap(tmp_path: Path) -> None:
    unpickled_elsewhere(tmp_path, list(LARGE), ("adapt(None)", "adapt(0)", "unwrap"))


@pytest.mark.sampled(16)
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


@pytest.mark.sampled(24)
@policy_cases(name for name in CASES if "closure" not in name)
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


@pytest.mark.sampled(10)
@policy_cases(ALL)
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
        elif name == "kinds of norm" and norm != "batch" and made != "unwrap":
            # The user's norm kept no statistics, and now has to.
            assert '"stateless.running_mean"' in outcome(lambda fresh=fresh, state=state: fresh.load_state_dict(state))
            fresh.stateless = nn.BatchNorm1d(6).double().eval()
        fresh.load_state_dict(state)
        assert_same_output(call(fresh, target_x), call(plain, target_x), 0)


@pytest.mark.parametrize("norm", PLAIN_POLICIES)
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


@pytest.mark.sampled(5)
@policy_cases(ALL, ("batch", "support"))
def test_adapted_module_exports_as_the_original_does(name: str, norm: str) -> None:
    assert_exports(name, norm, ("adapt(None)",))


@pytest.mark.slow
@policy_cases(ALL)
def test_every_returned_module_exports_as_the_original_does(name: str, norm: str) -> None:
    assert_exports(name, norm, tuple(returned(name, norm)))


SIZES = (2, 5, 12)


@pytest.mark.sampled(2)
@pytest.mark.parametrize("norm", PLAIN_POLICIES)
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
    transductive = norm == "batch"
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


@pytest.mark.sampled(2)
@pytest.mark.parametrize("norm", PLAIN_POLICIES)
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
