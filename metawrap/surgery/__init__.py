"""Looking into a user's module, and changing a copy of it. Top to bottom:

wrap.py: the whole of wrapping: check, copy, swap, select
swap.py: batch norms to per-step norms, and back to a plain module
inspect.py: norms, parameters, hazards and the head of a module; reads only
copying.py: copies in which nothing points at the original
"""
