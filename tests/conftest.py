"""One thread for all tests: on small tensors it is faster, and two busy processes with two threads each crawl.

No convolution is too small for the quick form here, so that all networks are tried in it. Glyphs are drawn once in a
process: a data set takes a second.
"""

import functools
import os

import torch

from metawrap.data import glyphs
from metawrap.layers import quick_forms

torch.set_num_threads(1)
# pytest-xdist tells its workers the width of a terminal, which the library would follow.
os.environ.pop("COLUMNS", None)
quick_forms.LARGE = quick_forms.LARGE_AT_BEST = quick_forms.LARGE_POOLING = 0
glyphs.draw_class = functools.lru_cache(10_000)(glyphs.draw_class)
