"""The tests. The workers use all cores, so each worker and its child processes use one thread.

numpy reads these variables when it is imported.
"""

import os

if os.environ.get("PYTEST_XDIST_WORKER"):
    os.environ.update(OMP_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1", MKL_NUM_THREADS="1")
