"""How workers run: in threads or in forked processes."""

from __future__ import annotations

import sys

import pytest
from models import class_tasks

FOUR = class_tasks((4,), tasks=4)
WORKERS_IN = ["threads", pytest.param("processes", marks=pytest.mark.skipif(sys.platform != "linux", reason="no fork"))]
