"""What `scripts/validate_gpu.sh` measures on a GPU, step by step: `python -m gpu`, from the folder above this one.

A step is a module: its `rows(device)` are what it measures, each by itself; `told(results)` are the lines that the
summary says of them; `SECONDS` it takes at most, `ROW_SECONDS` a row of it, and `WORKERS` rows are measured at a time.
"""

import time

BEGUN = time.monotonic()  # before torch is imported, which takes a minute from a slow disk
