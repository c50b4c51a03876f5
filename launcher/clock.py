"""When this program began: a person has waited since, whatever was loaded meanwhile."""
from __future__ import annotations

import time

BEGAN = time.monotonic()
