"""Fast twins of the readable forms: <model>.py in Numba, <model>.cu in CUDA C."""

import numba

# Threads of another pool spin against OpenBLAS's; a layer that the host program already chose is
# respected.
if numba.config.THREADING_LAYER == "default":
    numba.config.THREADING_LAYER = "workqueue"
