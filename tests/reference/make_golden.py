"""Writes golden/small.npz with the oracle: `python tests/reference/make_golden.py`. Array names are those of
the reference files.

Arrays are drawn by NumPy, whose generator is the same on every platform, and images are multiples of 1/16 so that they
compress well.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from models import Conv4
from oracle import conv4_meta_gradient, msl_weights

PATH = Path(__file__).parent / "golden" / "small.npz"
TASKS, WAYS, TARGETS, FILTERS, SIZE, STEPS = 2, 3, 2, 4, 16, 3
EPOCH, ANNEAL_EPOCHS = 3, 10


def make() -> dict[str, np.ndarray]:
    random = np.random.default_rng(20180)
    arrays: dict[str, np.ndarray] = {}
    for part, count in (("support", 1), ("target", TARGETS)):
        images = random.integers(0, 16, (TASKS, WAYS * count, 1, SIZE, SIZE)) / 16
        arrays[f"{part}_x"] = images
        arrays[f"{part}_y"] = np.tile(np.repeat(np.arange(WAYS), count), (TASKS, 1))
    values, rates, statistics = {}, {}, {}
    for name, parameter in Conv4(FILTERS, WAYS, size=SIZE).named_parameters():
        if "norm" in name:
            centre = 1.0 if name.endswith("weight") else 0.0
            values[name] = centre + 0.1 * random.standard_normal((STEPS, FILTERS))
        else:
            values[name] = 0.4 * random.standard_normal(tuple(parameter.shape))
            rates[name] = 0.1 + 0.03 * random.standard_normal(STEPS + 1)
    for block in range(4):
        statistics[f"conv{block}.norm.running_mean"] = 0.1 * random.standard_normal((STEPS, FILTERS))
        statistics[f"conv{block}.norm.running_var"] = 1 + 0.1 * random.random((STEPS, FILTERS))
    arrays |= {f"init/{name}": value for name, value in (values | statistics).items()}
    arrays |= {f"init/lr/{name}": value for name, value in rates.items()}

    tensors = [torch.from_numpy(arrays[name]) for name in ("support_x", "support_y", "target_x", "target_y")]
    weights = msl_weights(STEPS, EPOCH, ANNEAL_EPOCHS)
    reference = conv4_meta_gradient(
        list(zip(*tensors, strict=True)),
        {name: torch.from_numpy(value) for name, value in values.items()},
        {name: torch.from_numpy(value)[:STEPS] for name, value in rates.items()},
        {name: torch.from_numpy(value) for name, value in statistics.items()},
        weights,
    )
    logits = torch.stack(reference.predictions)
    arrays["loss"] = reference.loss.numpy()
    arrays["accuracy"] = (logits.argmax(-1) == tensors[3]).double().mean().numpy()
    arrays["step_weights"] = np.array(weights)
    arrays["logits_last"] = logits.numpy()
    for name, gradient in reference.gradients.items():
        value = gradient.numpy()
        arrays[f"grad/{name}"] = np.append(value, 0.0) if name.startswith("lr/") else value
    arrays |= {f"after/{name}": value.numpy() for name, value in reference.statistics.items()}
    return arrays


if __name__ == "__main__":
    PATH.parent.mkdir(exist_ok=True)
    np.savez_compressed(PATH, **make())
    print(f"{PATH}: {PATH.stat().st_size} bytes")
