"""Attention and the parts of nn.Transformer, with masks and fast paths."""

from __future__ import annotations

import warnings
from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from entry import Entry
from keywords import grouped
from pieces import SEQUENCES, Whole, words
from torch import Tensor, nn


class Attention(nn.Module):
    def __init__(self, need_weights: bool, **options: Any) -> None:
        super().__init__()
        self.into = nn.Linear(3, 4)
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True, **options)
        self.last = nn.Linear(4, 3)
        self.need_weights = need_weights

    def forward(self, x: Tensor) -> Tensor:
        x = self.into(x)
        attended, weights = self.attention(x, x, x, need_weights=self.need_weights)
        return self.last(attended.mean(1) + (0 if weights is None else weights.square().mean((1, 2))[:, None]))


class CrossAttention(nn.Module):
    """Keys and values of other widths, so that the projections are parameters of their own."""

    def __init__(self) -> None:
        super().__init__()
        self.queries = nn.Parameter(torch.randn(2, 4))
        self.attention = nn.MultiheadAttention(4, 2, kdim=3, vdim=3, batch_first=True, add_bias_kv=True)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.expand(len(x), -1, -1)
        return self.last(self.attention(queries, x, x, need_weights=False)[0].flatten(1))


def _causal_by_hand(model: Any, x: Tensor) -> Tensor:
    q, k, v = (part.unflatten(-1, (2, 2)).transpose(1, 2) for part in model.mixed(x).chunk(3, -1))
    x = F.scaled_dot_product_attention(q, k, v, is_causal=True, dropout_p=0.1 if model.training else 0.0)
    return model.last(x.transpose(1, 2).flatten(2)[:, -1])


def _layer(kind: Any, **options: Any) -> nn.Module:
    return kind(4, 2, 8, **grouped(**{"dropout": 0.2, "batch_first": True} | options))


class Encoder(nn.Module):
    """Words, of which number 0 is padding; in evaluation the padded encoder takes nested tensors and the fast path."""

    def __init__(self, **options: Any) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4, padding_idx=0)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # nested tensors are said to be a prototype
            self.encoder = nn.TransformerEncoder(_layer(nn.TransformerEncoderLayer, **options), 2, nn.LayerNorm(4))
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        padded = (x == 0).index_fill(1, torch.tensor([0]), False)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self.last(self.encoder(self.words(x), src_key_padding_mask=padded)[:, 0])


class CausalEncoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(3, 4)
        self.place = nn.Parameter(torch.randn(5, 4) * 0.1)
        self.encoder = nn.TransformerEncoder(_layer(nn.TransformerEncoderLayer), 2, enable_nested_tensor=False)
        self.last = nn.Linear(4, 3)

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=x.dtype)
        return self.last(self.encoder(self.into(x) + self.place, mask=mask, is_causal=True)[:, -1])


class Decoder(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.into = nn.Linear(3, 4)
        self.queries = nn.Embedding(2, 4)
        self.decoder = nn.TransformerDecoder(_layer(nn.TransformerDecoderLayer, activation="gelu"), 2)
        self.last = nn.Linear(8, 3)

    def forward(self, x: Tensor) -> Tensor:
        queries = self.queries.weight.expand(len(x), -1, -1)
        return self.last(self.decoder(queries, self.into(x)).flatten(1))


def transformer() -> nn.Module:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        layers = nn.Transformer(4, 2, 1, 1, 8, dropout=0.1, batch_first=True)
    run = lambda m, x: m.last(m.transformer(m.into(x)[:, :3], m.into(x)[:, 3:]).mean(1))
    return Whole(run, into=nn.Linear(3, 4), transformer=layers, last=nn.Linear(4, 3))


class TiedWords(nn.Module):
    """A language model: each position predicts a word, through the embedding's own weight."""

    def __init__(self) -> None:
        super().__init__()
        self.words = nn.Embedding(9, 4)
        self.encoder = _layer(nn.TransformerEncoderLayer, norm_first=True)
        self.out = nn.Linear(4, 9, bias=False)
        self.out.weight = self.words.weight

    def forward(self, x: Tensor) -> Tensor:
        mask = nn.Transformer.generate_square_subsequent_mask(x.shape[1], dtype=self.out.weight.dtype)
        return self.out(self.encoder(self.words(x), src_mask=mask, is_causal=True))


def next_words() -> list[Any]:
    return [(x, x.roll(-1, 1), y, y.roll(-1, 1)) for x, _, y, _ in words()()]


def over_words(prediction: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(prediction.flatten(0, 1), y.flatten())


_entry = partial(Entry, family="attention", tasks=SEQUENCES, inner_lr=0.3, quick=True)

PATTERNS = [
    _entry("MultiheadAttention", make=partial(Attention, True)),
    _entry("MultiheadAttention without weights", make=partial(Attention, False)),
    _entry(
        "MultiheadAttention, dropout, zero attention", make=partial(Attention, False, dropout=0.2, add_zero_attn=True)
    ),
    _entry("MultiheadAttention across widths", make=CrossAttention),
    _entry(
        "scaled_dot_product_attention, causal",
        make=lambda: Whole(_causal_by_hand, mixed=nn.Linear(3, 12), last=nn.Linear(4, 3)),
    ),
    _entry("TransformerEncoder, padded", make=Encoder, tasks=words()),
    _entry("TransformerEncoder, padded, norm first", make=partial(Encoder, norm_first=True), tasks=words()),
    _entry("TransformerEncoder, causal", make=CausalEncoder),
    _entry("TransformerDecoder", make=Decoder),
    _entry("Transformer", make=transformer),
    _entry("tied embedding and output", make=TiedWords, tasks=next_words, loss_fn=over_words),
]
