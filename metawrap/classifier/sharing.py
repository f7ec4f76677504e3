"""A classifier -> a folder with a model card, or a repository of the Hugging Face Hub, and back."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, TypeVar

from metawrap.classifier.estimate import Estimate
from metawrap.engines import first_line
from metawrap.errors import ArgumentError, MetaWrapError, printable, shown

CARD = "README.md"
_MARK = "library_name: metawrap"
_READ = ["*.json", "*.pt2", "*.onnx", "*.safetensors"]  # of a repository: no scripts
_SHOWN = 100  # classes
_FORMS = {
    "photos": ("image-classification", "photo.jpg", "torch, numpy and Pillow"),
    "texts": ("text-classification", '"a text"', "torch and tokenizers"),
}
T = TypeVar("T")


def is_card(path: Path) -> bool:
    """Whether a file is a model card that metawrap wrote."""
    with path.open("rb") as file:
        return _MARK.encode() in file.read(200)


def card_of(about: Mapping[str, Any], classes: Sequence[str], kind: str, repository: str = ".") -> str:
    """The model card, in Markdown.

    Args:
        about: `Classifier.about`; texts in it may be a stranger's. repository: as `from_pretrained` takes it.
    """
    task, example, needs = _FORMS[kind]
    counts = about.get(kind)
    counts = counts if isinstance(counts, dict) else {}
    numbers = [count for count in counts.values() if isinstance(count, int)]
    names = [f"{_plain(name)} ({_plain(counts.get(name, '?'))})" for name in classes[:_SHOWN]]
    more = f" and {len(classes) - _SHOWN} more, see classifier.json" if len(classes) > _SHOWN else ""
    rows = {
        f"classes ({kind})": ", ".join(names) + more,
        "data": f"{sum(numbers)} {kind} of {len(classes)} classes",
        "network": _plain(about.get("network", "not recorded")),
        "method": _plain(about.get("method", "not recorded")),
        "batch norm": f"{_plain(about.get('norm', 'not recorded'))} (the policy of metawrap, norm=)",
        "accuracy": _accuracy(about.get("estimate"), kind),
    }
    table = "\n".join(f"| {name} | {value} |" for name, value in rows.items())
    return f"""---
{_MARK}
pipeline_tag: {task}
tags:
- metawrap
- few-shot
---

# A classifier of {kind} with {len(classes)} classes

| | |
| --- | --- |
{table}

The accuracy is an estimate from the {kind} that the classifier was made of: each was left out once, and predicted from
the others. New {kind} from elsewhere may do worse.

## With metawrap

```python
from metawrap.classifier import Classifier

[prediction] = Classifier.from_pretrained({repository!r}).predict([{example if example[0] == '"' else repr(example)}])
print(prediction.name, prediction.probability)
```

`from_pretrained` runs no code of this folder. In a shell: `metawrap predict FOLDER {example}`.

## Without metawrap

```sh
python predict.py {example}
```

The script needs {needs}. It loads `network.pt2` by `torch.export.load`, which can run code of the file: use it where
you trust the author.
"""


def _accuracy(estimate: Any, kind: str) -> str:
    try:
        found = Estimate(int(estimate["right"]), int(estimate["examples"]), int(estimate["rounds"]), ())
        return f"of {kind} left out, {found}"
    except (TypeError, KeyError, ValueError, ArithmeticError):
        return "no estimate"


def _plain(value: Any) -> str:
    """A value in one line, without Markdown or HTML."""
    text = printable(value if isinstance(value, str) else shown(value)).replace("\n", " ")[:300]
    return re.sub(r"([!-$&(-+:-@\[-`{-~])", r"\\\1", text)


class Shared:
    """The methods of `huggingface_hub.ModelHubMixin`, for a class with `write_shared`, `card` and `load`.

    They need huggingface_hub: pip install "metawrap[hub]".
    """

    def write_shared(self, out: Path) -> None:
        """Writes all files but the card."""
        raise NotImplementedError

    def check_free(self, out: Path) -> None:
        """Raises ArgumentError if the folder holds something else."""
        raise NotImplementedError

    def card(self, repository: str = ".") -> str:
        """The model card, in Markdown."""
        raise NotImplementedError

    def save_pretrained(self, folder: str | Path) -> Path:
        """Writes the classifier with a model card, README.md, into a new folder, or over a classifier in it.

        A loaded classifier is copied. The command line, which classifier.json of `metawrap adapt` has, is left out.

        Raises:
            ArgumentError: the folder holds something else, or cannot be written.
        """
        self.check_free(Path(folder))
        _hub(self).save_pretrained(folder)
        return Path(folder)

    def push_to_hub(self, repository: str, **options: Any) -> Any:
        """Uploads what `save_pretrained` writes to a repository of the Hub, which is made if it is new.

        Args:
            repository: "user/name". options: of `ModelHubMixin.push_to_hub`, such as private, token or branch.
        Returns:
            What the Hub says of the commit.
        """
        return _hub(self).push_to_hub(repository, model_card_kwargs={"repository": repository}, **options)

    @classmethod
    def from_pretrained(cls: type[T], name: str | Path, runtime: str = "torch", **options: Any) -> T:
        """The classifier in a folder of `save_pretrained`, or in a repository of the Hub. No code of it runs.

        Args:
            name: the folder, or "user/name". runtime: as in `load`. options: of `huggingface_hub.snapshot_download`,
                such as revision or token.
        Raises:
            ArgumentError: there is none, or the Hub does not give it. DataError: it is refused; see `load`.
        """
        place: Any = Path(name)
        try:
            if not place.is_dir():
                # Not by the mixin's method of this name, which takes arguments from a stranger's config.json.
                place = _package().snapshot_download(str(name), allow_patterns=_READ, **options)
        except MetaWrapError:
            raise
        except Exception as error:  # Of the Hub, the network or the disk.
            raise ArgumentError(
                f"name: '{name}' cannot be loaded ({first_line(error)}). Check the name and the connection, or name a "
                "folder that is here."
            ) from error
        found: T = cls.load(place, runtime)  # type: ignore[attr-defined]
        return found


def _package() -> Any:
    try:
        import huggingface_hub
    except ImportError as error:
        raise MetaWrapError('Sharing needs huggingface_hub: pip install "metawrap[hub]".') from error
    return huggingface_hub


def _hub(shared: Shared) -> Any:
    """The mixin of huggingface_hub with the files and the card of `shared`."""
    package = _package()

    class Hub(package.ModelHubMixin):  # type: ignore[misc, name-defined]
        # Without arguments: it would write those that it has into a config.json.
        def __init__(self) -> None:
            pass

        def _save_pretrained(self, save_directory: Path) -> None:
            shared.write_shared(save_directory)

        def generate_model_card(self, *args: Any, **kwargs: Any) -> Any:
            return package.ModelCard(shared.card(*args, **kwargs))

    return Hub()
