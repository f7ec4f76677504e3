"""State that is read, compared and put back. Top to bottom:

module_state.py: parameters, buffers, attributes and containers of modules; signals held back meanwhile
reachable_state.py: all state that a call of a model or a loss can reach, by value
fingerprint.py: all that a call can reach, as bytes, to see whether anything has changed
generators.py: random states
"""
