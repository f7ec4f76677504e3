"""One thread for all tests: on small tensors it is faster, and two busy processes with two threads each crawl."""

import torch

torch.set_num_threads(1)
