"""What a learner says of itself: facts, laid out once, shown as text, in a terminal or in a notebook.

modules.py (a row for each module) and description.py (everything else) -> page.py (words in cells)
    -> terminal.py (rich, and plain text through it) and notebook.py (HTML).
"""

from metawrap.description.description import Description
from metawrap.description.modules import Fate, ModuleRow

__all__ = ["Description", "Fate", "ModuleRow"]
