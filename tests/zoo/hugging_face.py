"""Networks of Hugging Face transformers, built from tiny configurations: keywords in, a dataclass out."""

from __future__ import annotations

import math
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from entry import Entry
from steady import steady
from torch import Tensor, nn

WAYS, VOCABULARY, LENGTH = 3, 30, 7
EXAMPLES = {"support": 2, "target": 1}  # Per class.
Inputs = dict[str, Tensor]


def _made(model: str, config: str, **options: Any) -> nn.Module:
    import transformers  # Not at the top: the tests that run by default do without it.

    # The usual 0.02 is meant for wide layers: on 16 channels the gradients of all but the head would nearly vanish.
    made = getattr(transformers, config)(num_labels=WAYS, **{"initializer_range": 0.3, **options})
    return steady(getattr(transformers, model)(made))


def _tasks(inputs: Callable[[Tensor, torch.Generator], Inputs], per_token: bool = False) -> list[tuple[Any, ...]]:
    generator = torch.Generator().manual_seed(0)
    task: list[Any] = []
    for examples in EXAMPLES.values():
        y = torch.arange(WAYS).repeat(examples)
        task += [inputs(y, generator), y[:, None].repeat(1, LENGTH) if per_token else y]
    return [tuple(task)]


def _words(y: Tensor, generator: torch.Generator) -> Inputs:
    tokens = torch.randint(3 + WAYS, VOCABULARY, (len(y), LENGTH), generator=generator)
    tokens[:, 1] = 3 + y  # Something to learn.
    lengths = LENGTH - 2 * (torch.arange(len(y)) % 2)
    mask = (torch.arange(LENGTH) < lengths[:, None]).long()
    tokens[torch.arange(len(y)), lengths - 1] = _TOKENS["eos_token_id"]
    return {"input_ids": tokens * mask, "attention_mask": mask}


def _noise(y: Tensor, generator: torch.Generator, *shape: int) -> Tensor:
    noise = torch.randn(len(y), math.prod(shape), generator=generator, dtype=torch.float64)
    return (noise + y[:, None] - 1).unflatten(1, shape)


def _pictures(y: Tensor, generator: torch.Generator, size: int = 16) -> Inputs:
    return {"pixel_values": _noise(y, generator, 3, size, size)}


def _waves(y: Tensor, generator: torch.Generator) -> Inputs:
    return {"input_values": torch.sin(torch.arange(200) / (4.0 + y[:, None])) + 0.3 * _noise(y, generator, 200)}


def _mels(y: Tensor, generator: torch.Generator) -> Inputs:
    return {"input_features": _noise(y, generator, 8, 16)}


def _spectrogram(y: Tensor, generator: torch.Generator) -> Inputs:
    return {"input_values": _noise(y, generator, 16, 8)}


def _logits(output: Any, y: Tensor) -> Tensor:
    """Classes last: of an example, or of each token."""
    return F.cross_entropy(output.logits.flatten(0, -2), y.flatten())


def _next_word(output: Any, y: Tensor) -> Tensor:
    return F.cross_entropy(output.logits[:, -1], y)


def _all_layers(output: Any, y: Tensor) -> Tensor:
    return _logits(output, y) + 0.1 * sum(layer.square().mean() for layer in output.hidden_states)


def _entry(
    name: str,
    stem: str,
    inputs: Callable[[Tensor, torch.Generator], Inputs],
    head: str,
    *,
    loss_fn: Callable[[Any, Tensor], Tensor] = _logits,
    higher: bool = True,
    sets_itself_up: bool = False,
    quick: bool = False,
    note: str = "",
    **options: Any,
) -> Entry:
    return Entry(
        name,
        "Hugging Face transformers",
        partial(_made, f"{stem}For{head}", f"{stem}Config", **options),
        partial(_tasks, inputs, head == "TokenClassification"),
        loss_fn=loss_fn,
        inner_lr=0.05,
        higher=higher,
        sets_itself_up=sets_itself_up,
        quick=quick,
        needs="transformers",
        note=note,
    )


def _text(name: str, stem: str, head: str = "SequenceClassification", **more: Any) -> Entry:
    return _entry(name, stem, _words, head, **_WIDTH, **_TOKENS, **more)


def _image(name: str, stem: str, size: int = 16, **more: Any) -> Entry:
    return _entry(name, stem, partial(_pictures, size=size), "ImageClassification", image_size=size, **more)


def _sound(name: str, stem: str, inputs: Callable[..., Inputs], head: str, **more: Any) -> Entry:
    return _entry(name, stem, inputs, head, **_WIDTH, **more)


_TOKENS = {"vocab_size": VOCABULARY, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2}
_WIDTH = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
_GROUPED = {"num_key_value_heads": 1, "higher": False, "note": "slices its ModuleList of layers"}
_VIT = {**_WIDTH, "patch_size": 8}
_STAGES = {"hidden_sizes": [8, 16], "depths": [1, 1]}
_WAV2VEC = {
    "vocab_size": VOCABULARY,
    "conv_dim": (8, 8),
    "conv_kernel": (10, 4),
    "conv_stride": (5, 4),
    "num_feat_extract_layers": 2,
    "num_conv_pos_embeddings": 4,
    "num_conv_pos_embedding_groups": 2,
    "classifier_proj_size": 16,
    "apply_spec_augment": False,  # It draws from NumPy's generator.
    "higher": False,
    "sets_itself_up": True,
    "note": "parametrized weight norm",
}
_WHISPER = {
    **_TOKENS,
    "d_model": 16,
    "encoder_layers": 2,
    "encoder_attention_heads": 2,
    "encoder_ffn_dim": 24,
    "num_mel_bins": 8,
    "max_source_positions": 8,
    "classifier_proj_size": 16,
    "decoder_start_token_id": 1,
}
_OPT = {"ffn_dim": 24, "word_embed_proj_dim": 16}
_T5 = {"d_model": 16, "d_kv": 8, "d_ff": 24, "num_layers": 2, "num_heads": 2, "decoder_start_token_id": 0}

HUGGING_FACE = [
    _text("BERT", "Bert", quick=True),
    _text("BERT, a class per token", "Bert", "TokenClassification"),
    _text(
        "BERT, a loss of its hidden states",
        "Bert",
        loss_fn=_all_layers,
        output_hidden_states=True,
        higher=False,
        sets_itself_up=True,
        note="hooks itself at its first call",
    ),
    _text("DistilBERT", "DistilBert", hidden_dim=24),
    _text("RoBERTa", "Roberta"),
    _text("ALBERT", "Albert", embedding_size=8, note="all layers share their parameters"),
    _text("ELECTRA", "Electra", embedding_size=8),
    _text("DeBERTa v2", "DebertaV2", relative_attention=True, pos_att_type=["p2c", "c2p"]),
    _text("MPNet", "MPNet"),
    _text("ModernBERT", "ModernBert", cls_token_id=1, sep_token_id=2),
    _text("GPT-2", "GPT2"),
    _text("GPT-NeoX", "GPTNeoX"),
    _text("OPT", "OPT", **_OPT),
    _text("OPT, next word", "OPT", "CausalLM", loss_fn=_next_word, **_OPT, note="output weights are the embedding"),
    _text("Llama", "Llama", **_GROUPED),
    _text("Mistral", "Mistral", sliding_window=3, **_GROUPED),
    _text("Qwen2", "Qwen2", **_GROUPED),
    _text("Gemma", "Gemma", head_dim=8, **_GROUPED),
    # Its fused kernel for the experts takes no float64.
    _text("Mixtral", "Mixtral", num_local_experts=4, experts_implementation="eager", **_GROUPED),
    _text("T5", "T5", **_T5),
    _text("T5 encoder, a class per token", "T5", "TokenClassification", **_T5),
    _text(
        "BART", "Bart", d_model=16, encoder_ffn_dim=24, decoder_ffn_dim=24, decoder_layers=2, max_position_embeddings=16
    ),
    _text("Mamba, next word", "Mamba", "CausalLM", loss_fn=_next_word, state_size=4),
    _image("ViT", "ViT", **_VIT),
    _image("DeiT", "DeiT", **_VIT),
    _image("BEiT", "Beit", **_VIT),
    _image("DINOv2", "Dinov2", **_VIT, mlp_ratio=2),
    _image("ConvNeXt", "ConvNext", 32, **_STAGES, num_stages=2),
    _image("ConvNeXt v2", "ConvNextV2", 32, **_STAGES, num_stages=2),
    _image("Swin", "Swin", patch_size=2, embed_dim=8, depths=[2, 1], num_heads=[2, 2], window_size=4),
    _image("ResNet", "ResNet", 32, **_STAGES, embedding_size=8, layer_type="basic"),
    _image("RegNet", "RegNet", 32, **_STAGES, embedding_size=8, groups_width=4),
    _image(
        "MobileViT",
        "MobileViT",
        32,
        hidden_sizes=[8, 8, 8],
        neck_hidden_sizes=[4, 4, 8, 8, 8, 8, 8],
        num_attention_heads=2,
    ),
    _image("PoolFormer", "PoolFormer", 32, hidden_sizes=[4, 4, 8, 8], depths=[1, 1, 1, 1]),
    _sound("Wav2Vec2", "Wav2Vec2", _waves, "SequenceClassification", **_WAV2VEC),
    _sound("HuBERT", "Hubert", _waves, "SequenceClassification", **_WAV2VEC),
    _sound("Whisper encoder", "Whisper", _mels, "AudioClassification", **_WHISPER),
    _sound(
        "Audio Spectrogram Transformer",
        "AST",
        _spectrogram,
        "AudioClassification",
        patch_size=4,
        max_length=16,
        num_mel_bins=8,
        frequency_stride=4,
        time_stride=4,
    ),
]
