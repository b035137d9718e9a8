"""``python -m normnet.predict``."""

from __future__ import annotations

import sys

from normnet.predict.command import main

if __name__ == "__main__":
    sys.exit(main())
