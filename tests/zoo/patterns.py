"""Networks written the way people write them: every habit that has broken a library before."""

from __future__ import annotations

import patterns_attention
import patterns_autograd
import patterns_classes
import patterns_flow
import patterns_hooks
import patterns_layers
import patterns_norms
import patterns_parameters
import patterns_parametrized
import patterns_python
import patterns_recurrent
import patterns_state
import patterns_wrappers

_FAMILIES = (
    patterns_layers,
    patterns_python,
    patterns_classes,
    patterns_flow,
    patterns_state,
    patterns_hooks,
    patterns_wrappers,
    patterns_autograd,
    patterns_parameters,
    patterns_parametrized,
    patterns_norms,
    patterns_recurrent,
    patterns_attention,
)
PATTERNS = [entry for family in _FAMILIES for entry in family.PATTERNS]
