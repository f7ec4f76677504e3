"""A tiny text encoder in a folder of Hugging Face's form, and texts of three intents."""

from __future__ import annotations

import json
from pathlib import Path

import torch

WORDS = {
    "light": ["lamp", "bright", "dark", "dim"],
    "music": ["song", "play", "loud", "jazz"],
    "weather": ["rain", "sun", "cold", "storm"],
}
MAX_TOKENS = 12


def texts(name: str) -> list[str]:
    """Four texts of an intent, of different lengths."""
    one, two, three, four = WORDS[name]
    return [f"the {one}", f"{two} {one} now", f"please the {three} {one} {two} now", f"{four} {three}"]


def table(path: Path) -> Path:
    """A CSV of all texts."""
    rows = [f"{text},{name}" for name in WORDS for text in texts(name)]
    path.write_text("\n".join(["text,class", *rows]) + "\n", encoding="utf-8")
    return path


def encoder(folder: Path, *, pooling: str | None = "mean_tokens", kind: str = "Bert") -> Path:
    """Writes a model with random weights, its tokenizer, and the files of sentence-transformers."""
    import transformers
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    words = ["the", "please", "now", *(word for own in WORDS.values() for word in own)]
    vocabulary = {word: number for number, word in enumerate([*special, *words])}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, "[UNK]"))
    tokenizer.normalizer, tokenizer.pre_tokenizer = normalizers.Lowercase(), pre_tokenizers.Whitespace()
    marks = [(mark, vocabulary[mark]) for mark in ("[CLS]", "[SEP]")]
    tokenizer.post_processor = processors.TemplateProcessing("[CLS] $A [SEP]", None, marks)
    names = {"pad_token": "[PAD]", "unk_token": "[UNK]", "cls_token": "[CLS]", "sep_token": "[SEP]"}
    transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, **names).save_pretrained(folder)
    sizes = {"hidden_size": 32, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 32}
    config = getattr(transformers, f"{kind}Config")(vocab_size=len(vocabulary), max_position_embeddings=32, **sizes)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = getattr(transformers, f"{kind}Model")(config)
    torch.nn.init.normal_(model.get_input_embeddings().weight)  # Far from each other, unlike at the start of training.
    model.save_pretrained(folder)
    if pooling is not None:
        parts = {"Transformer": "", "Pooling": "1_Pooling", "Normalize": "2_Normalize"}
        modules = [{"type": f"sentence_transformers.models.{part}", "path": path} for part, path in parts.items()]
        (folder / "1_Pooling").mkdir()
        write(folder / "modules.json", modules)
        write(folder / "1_Pooling" / "config.json", {f"pooling_mode_{pooling}": True, "word_embedding_dimension": 32})
        write(folder / "sentence_bert_config.json", {"max_seq_length": MAX_TOKENS, "do_lower_case": False})
    return folder


def write(path: Path, value: object) -> None:
    """A JSON file."""
    path.write_text(json.dumps(value), encoding="utf-8")
