"""One thread for all tests: on small tensors it is faster, and two busy processes with two threads each crawl.

And no convolution is too small for the form that large ones take: it is that form that all networks are to be tried in.
"""

import os

import torch

from metawrap.engines import quick

torch.set_num_threads(1)
# pytest-xdist tells its workers the width of a terminal, which the library would follow.
os.environ.pop("COLUMNS", None)
quick.LARGE = quick.LARGE_AT_BEST = quick.LARGE_POOLING = 0
