"""python -m metawrap."""

from __future__ import annotations

import sys

from metawrap.cli import main

sys.exit(main())
