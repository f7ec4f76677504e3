"""A text encoder of Hugging Face -> a network from tokens to one vector for each text, and its preprocessing."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

from torch import Tensor, nn

from metawrap.data.problems import check_name
from metawrap.data.text_preprocessing import TextPreprocessing
from metawrap.errors import ArgumentError
from metawrap.pretrained import DEFAULT, load_network
from metawrap.weight_files import package

_HF = "hf:"
_POOLINGS = {"pooling_mode_mean_tokens": "mean", "pooling_mode_cls_token": "cls"}


class SentenceEncoder(nn.Module):
    """Token ids and masks, int64 of shape (texts, 2, tokens), to vectors, (texts, width).

    Args:
        encoder: called with input_ids and attention_mask; its output has last_hidden_state, (texts, tokens, width).
        width: of the vectors. pooling: the mean of the tokens that the mask keeps, or the first token, "cls".
        unit_length: whether vectors are divided by their length.
    """

    def __init__(
        self, encoder: nn.Module, width: int, pooling: Literal["mean", "cls"] = "mean", unit_length: bool = False
    ) -> None:
        super().__init__()
        self.width = width
        self.encoder, self.pooling, self.unit_length = encoder, pooling, unit_length

    def forward(self, tokens: Tensor) -> Tensor:
        """The vectors."""
        mask = tokens[:, 1]
        states: Tensor = self.encoder(input_ids=tokens[:, 0], attention_mask=mask).last_hidden_state
        if self.pooling == "cls":
            pooled = states[:, 0]
        else:
            kept = mask.unsqueeze(-1).to(states.dtype)
            pooled = (states * kept).sum(1) / kept.sum(1).clamp(min=1e-9)
        return nn.functional.normalize(pooled, dim=1) if self.unit_length else pooled


def load_encoder(name: str, weights: str | Path = DEFAULT) -> tuple[SentenceEncoder, TextPreprocessing, str]:
    """A sentence encoder, its preprocessing, and words about its weights.

    Pooling, length of the vectors and most tokens are those of the files of sentence-transformers in the model's
    folder; without them the vectors are the mean of the tokens.

    Args:
        name: "hf:" and the name or the folder of a text encoder. weights: as in `load_network`.
    Raises:
        ArgumentError: there is no such model or file, it encodes no texts, or the files ask for another pooling.
    """
    if not name.startswith(_HF):
        raise ArgumentError(f"model: texts need an encoder of Hugging Face, hf:NAME or hf:FOLDER, but got '{name}'.")
    place, transformers = name.removeprefix(_HF), package("transformers", name)
    made = load_network(name, weights)
    encoder: Any = made.model
    if getattr(encoder, "main_input_name", "") != "input_ids" or encoder.config.is_encoder_decoder:
        raise ArgumentError(f"model: '{name}' is a {type(encoder).__name__}, which encodes no texts. Name an encoder.")
    if getattr(encoder, "pooler", None) is not None:
        encoder.pooler = None  # It makes another output, which nothing reads.
    how, most = _of_sentence_transformers(name, place)
    try:
        tokenizer = transformers.AutoTokenizer.from_pretrained(place, trust_remote_code=False)
        content = tokenizer.backend_tokenizer.to_str()
    except Exception as error:  # Of many kinds, by version and tokenizer.
        raise ArgumentError(
            f"model: '{name}' has no tokenizer that can be read ({type(error).__name__}). Get its tokenizer.json."
        ) from error
    padding = (tokenizer.pad_token, tokenizer.pad_token_id) if tokenizer.pad_token is not None else None
    # Some count positions from behind the padding token's.
    first = getattr(getattr(encoder, "embeddings", None), "padding_idx", -1) + 1
    positions = getattr(encoder.config, "max_position_embeddings", None) or 512
    way = TextPreprocessing.of(content, min(most, tokenizer.model_max_length, positions - first), padding)
    pooled = f"; each text is the {how['pooling']} of its tokens{', of length 1' * how['unit_length']}"
    return SentenceEncoder(encoder, encoder.config.hidden_size, **how), way, made.words + pooled


def _of_sentence_transformers(name: str, place: str) -> tuple[dict[str, Any], int]:
    """Keywords of `SentenceEncoder`, and the most tokens of a text."""
    modules = _json(place, "modules.json")
    if modules is None:
        return {"pooling": "mean", "unit_length": False}, 2**17
    kinds = {each["type"].rpartition(".")[2]: each["path"] for each in modules}
    pooling = _json(place, f"{kinds['Pooling']}/config.json") if "Pooling" in kinds else None
    asked = {key for key, value in (pooling or {}).items() if key.startswith("pooling_mode_") and value is True}
    limits = _json(place, "sentence_bert_config.json") or {}
    strange = sorted(kinds.keys() - {"Transformer", "Pooling", "Normalize"}) + sorted(asked - _POOLINGS.keys())
    if strange or len(asked) != 1 or limits.get("do_lower_case"):
        what = strange or sorted(asked) or ["do_lower_case"]
        raise ArgumentError(
            f"model: '{name}' makes vectors of texts in a way that is not known ({what[0]}). Expected a mean or cls "
            "pooling. Wrap the encoder by metawrap.sentence_encoder.SentenceEncoder in Python."
        )
    return {"pooling": _POOLINGS[asked.pop()], "unit_length": "Normalize" in kinds}, limits.get("max_seq_length") or 512


def _json(place: str, file: str) -> Any:
    """The content of a JSON file of the model; None if it has no such file."""
    check_name(file, f"The model '{place}'")
    found = package("transformers.utils", place).cached_file(
        place, file, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return None if found is None else json.loads(Path(found).read_text(encoding="utf-8"))
