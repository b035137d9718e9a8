"""Entry point of ``python -m lesionsynth``."""

from __future__ import annotations

import sys

from lesionsynth.cli import main

if __name__ == "__main__":
    sys.exit(main())
