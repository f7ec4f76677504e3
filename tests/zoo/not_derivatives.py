"""Networks whose gradient is not the derivative of what they compute, by reason: finite differences are others."""

from __future__ import annotations

_REASONS = {
    "detached average": (
        *("counts in buffers", "multiplies by a buffer that it edits", "divides by a buffer that it edits"),
        *("buffers that grow", "replaces its buffers", "edits a buffer's data", "assigns a buffer's data"),
        *("edits buffers by batch_norm", "slow copy of its own layer"),
    ),
    "detached part": ("fixed point", "detached path", ".data", ".item() in the arithmetic"),
    "straight-through": ("gumbel softmax", "codebook", "function of one's own, straight through"),
    "backward of its own": ("function of one's own, gradient reversal", "Embedding, gradient by frequency"),
    "hook on gradients": (
        *("hook: full backward", "hook: before full backward", "hook: on a parameter"),
        *("hook: on a parameter, over the model", "hook on a hidden value"),
    ),
    "weights edited without gradient": (
        *("in place on the weights themselves", "Embedding, max_norm", "Embedding, max_norm, not adapted"),
    ),
    "power iteration without gradient": ("spectral_norm", "legacy spectral_norm", "two parametrized layers"),
    "signs in its diagonal": ("orthogonal, Householder",),
    "padding without gradient": ("OPT, next word",),  # Tied to the head, where the padding's row has one.
}
REASONS = {name: reason for reason, names in _REASONS.items() for name in names}
# Networks that convert to float32 in parts, where rounding would drown the differences.
IN_FLOAT32 = {
    *("half in single precision", "ModernBERT", "Llama", "Mistral", "Qwen2", "Gemma", "Mixtral", "T5"),
    *("T5 encoder, a class per token", "Mamba, next word"),
}
