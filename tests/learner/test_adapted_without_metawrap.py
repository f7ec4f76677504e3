"""What `adapt` returns: ordinary layers, the task's classes as outputs, and a pickle that needs no metawrap to load.

The pickles of all methods are loaded in one process where metawrap cannot be imported.
"""

from __future__ import annotations

import copy
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from contract import NETWORKS, VARIANTS, batch_of, make, quiet
from models import Conv4, NormedMlp, seeded
from torch import Tensor, nn

from metawrap import ProtoNet, Task
from metawrap.training.run_settings import METHODS

SUPPORT = Path(__file__).parents[1] / "support"
DOCS = (Path(__file__).parents[2] / "docs" / "methods.md").read_text()
# The same as in docs/methods.md.
NEEDS_METAWRAP = {"relationnet"}
NORMS = ("batch", "support", "running")
LINEAR = {"r2d2", "metaoptnet", "metaoptnet-ridge", "protonet"}
FITTED = LINEAR | {"logistic", "simpleshot", "protonet-cosine", "matchingnet", "siamese", "mann", "metanet"}
LOADER = """
import sys, torch
for name in ("metawrap", "higher"):
    sys.modules[name] = None  # Any import of it raises.
sys.path.insert(0, sys.argv[1])
for path in sys.argv[2:]:
    torch.save(torch.load(path, weights_only=False)(torch.load(path + ".x")).detach(), path + ".y")
assert not [name for name in sys.modules if name.startswith("metawrap.")]
"""
# A module of its own, whose classes can be imported without metawrap.
NETWORK = """
import torch
from torch import nn

class Net(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Linear(6, 5)
    def forward(self, x):
        return self.head(self.norm(self.body(x)).tanh())

class Maps(nn.Module):
    def __init__(self):
        super().__init__()
        self.body, self.norm, self.head = nn.Conv2d(1, 3, 3), nn.BatchNorm2d(3), nn.Linear(3, 5)
    def forward(self, x):
        return self.head(self.norm(self.body(x)).tanh().mean((2, 3)))

class Named(Net):
    def forward(self, x):
        return self.head(features=self.norm(self.body(x)).tanh())

class Head(nn.Linear):
    def forward(self, features):
        return super().forward(features)
"""


@pytest.fixture(scope="module")
def networks(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Any]:
    folder = tmp_path_factory.mktemp("networks")
    (folder / "plain_networks.py").write_text(NETWORK)
    sys.path.insert(0, str(folder))
    import plain_networks  # type: ignore[import-not-found]

    yield plain_networks
    sys.path.remove(str(folder))
    del sys.modules["plain_networks"]


def adapted_modules(networks: Any) -> Iterator[tuple[str, nn.Module, Tensor]]:
    """Every method and variant, every policy, and other places of a fitted head: name, module, inputs."""
    for case in [*METHODS, *VARIANTS]:
        if VARIANTS.get(case, (case,))[0] in NEEDS_METAWRAP:
            continue
        shape = NETWORKS[case][1] if case in NETWORKS else (4,)
        torch.manual_seed(0)
        network = (networks.Maps if len(shape) == 3 else networks.Net)().double()
        for norm in NORMS if case in ("maml++", "protonet") else ("support",):
            learner, [task] = make(case, copy.deepcopy(network), norm=norm), batch_of(case, 1)
            yield f"{case}-{norm}", learner.adapt(task.support_x, task.support_y), task.target_x
    x, y = torch.randn(6, 4).double(), torch.arange(6) % 3
    named = networks.Named().double()
    named.head = networks.Head(6, 5).double()
    for case in ("protonet", "simpleshot"):
        yield f"{case}-by-name", make(case, named, head="head").adapt(x, y), x
        body = nn.Sequential(networks.Net().double().body, nn.Unflatten(1, (2, 3)))
        yield f"{case}-output", make(case, body, embedding="output").adapt(x, y), x


def test_a_process_without_metawrap_loads_every_methods_module_and_predicts_the_same(
    networks: Any, tmp_path: Path
) -> None:
    expected = {}
    with quiet():
        for name, module, x in adapted_modules(networks):
            assert {type(m).__module__.split(".")[0] for m in module.modules()} <= {
                "torch",
                "plain_networks",
                "metawrap",
            }
            torch.save(module, tmp_path / name)
            torch.save(x, tmp_path / f"{name}.x")
            expected[name] = module(x).detach()
    paths = [str(tmp_path / name) for name in expected]
    folder = str(Path(networks.__file__).parent)
    found = subprocess.run([sys.executable, "-c", LOADER, folder, *paths], capture_output=True, text=True, cwd=tmp_path)
    assert found.returncode == 0, found.stderr[-3000:]
    for name, prediction in expected.items():
        torch.testing.assert_close(torch.load(tmp_path / f"{name}.y"), prediction, rtol=1e-12, atol=1e-12, msg=name)


@pytest.mark.parametrize("norm", ["support", "task"])
@pytest.mark.parametrize("name", ["protonet", *sorted(NEEDS_METAWRAP)])
def test_what_needs_metawrap_is_what_the_documents_list(name: str, norm: str, networks: Any, tmp_path: Path) -> None:
    with quiet():
        task = batch_of(name)[0]
        module = make(name, networks.Net().double(), norm=norm).adapt(task.support_x, task.support_y)
    torch.save(module, tmp_path / "module.pt")
    needs = b"metawrap" in (tmp_path / "module.pt").read_bytes()
    assert needs == (name in NEEDS_METAWRAP or norm == "task")


def test_the_documents_name_every_method_and_its_adapted_module() -> None:
    rows = re.findall(r"^\| `(\w+)` \|.*\| ([^|]+) \|$", DOCS, re.M)
    assert {name for name, _ in rows} == set(METHODS.values())
    assert {name for name, kind in rows if kind == "needs metawrap"} == {METHODS[name] for name in NEEDS_METAWRAP}
    assert {name for name, kind in rows if kind == "`nn.Linear`"} == {METHODS[name] for name in LINEAR & METHODS.keys()}


@pytest.mark.parametrize("case", sorted(LINEAR))
def test_a_linear_head_is_an_ordinary_layer_in_its_place(case: str) -> None:
    with quiet():
        for network, shape, kinds in ((NormedMlp, (4,), [nn.Linear]), (Conv4, (1, 16, 16), [nn.Linear])):
            task = batch_of("siamese-images" if len(shape) == 3 else case)[0]
            module = make(case, seeded(network)).adapt(task.support_x, task.support_y)
            assert type(module) is network
            assert [type(module.linear)] == kinds
            assert module.linear.out_features == 3


def test_behind_maps_a_linear_head_is_flattened_first_and_behind_an_output_it_follows_the_network() -> None:
    x, y = torch.randn(6, 1, 6, 6), torch.arange(6) % 3
    body = nn.Sequential(nn.Conv2d(1, 2, 3), nn.ReLU())
    module = ProtoNet(body, embedding="output").adapt(x, y)
    assert [type(part) for part in module] == [nn.Sequential, nn.Sequential]  # type: ignore[union-attr]
    assert [type(part) for part in module[1]] == [nn.Flatten, nn.Linear]  # type: ignore[index]
    means = torch.stack([body(x).flatten(1)[y == way].mean(0) for way in range(3)])
    expected = -torch.cdist(body(x).flatten(1), means).square()
    torch.testing.assert_close(module(x).softmax(1), expected.softmax(1))
    assert not any(part.training for part in module.modules())


@pytest.mark.parametrize("offset", [0.0, 30.0, 1000.0])
def test_large_embeddings_have_the_same_probabilities_in_evaluate_and_the_adapted_module(offset: float) -> None:
    """In float32; against distances in float64 as far as float32 carries embeddings of that length."""
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(15, 64, generator=generator) + offset * torch.randn(64, generator=generator)
    y = torch.arange(15) % 5
    learner = ProtoNet(nn.Sequential(nn.Identity(), nn.Linear(64, 5)))
    task = Task(x[:10], y[:10], x[10:], y[10:])
    found = learner.evaluate([task], keep_predictions=True).predictions[0].softmax(1)
    adapted = learner.adapt(task.support_x, task.support_y)(task.target_x).detach().softmax(1)
    torch.testing.assert_close(adapted, found, rtol=0, atol=1e-6)
    means = torch.stack([x[:10][y[:10] == way].double().mean(0) for way in range(5)])
    exact = -torch.cdist(x[10:].double(), means, compute_mode="donot_use_mm_for_euclid_dist").square()
    torch.testing.assert_close(adapted.double(), exact.softmax(1), rtol=0, atol=1e-5 * max(1.0, offset))


@pytest.mark.parametrize("case", [case for case in [*METHODS, *VARIANTS] if case not in NETWORKS])
def test_outputs_are_the_tasks_classes_and_no_others(case: str) -> None:
    """With the classes named; without, a fitted head has them too, and the user's own head keeps all its outputs."""
    with quiet():
        learner = make(case, seeded(lambda: NormedMlp(ways=9)))
        task = batch_of(case)[0]
        names = ["ape", "bee", "cow"]
        module = learner.adapt(task.support_x, [names[y] for y in task.support_y.tolist()], classes=names)
        found = module(task.target_x)
        assert found.shape == (len(task.target_y), 3)
        whole = learner.adapt(task.support_x, task.support_y)(task.target_x)
        assert whole.shape[1] in ((3,) if VARIANTS.get(case, (case,))[0] in FITTED else (3, 9))
        if VARIANTS.get(case, (case,))[0] not in ("reptile", "statistician"):
            torch.testing.assert_close(found, whole[:, :3], rtol=1e-9, atol=1e-9)
