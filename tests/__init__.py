"""The tests. One worker runs per core, so each has one thread, also in what it starts; numpy reads this at import."""

import os

if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
