"""One torch thread in tests: spinning pools on shared cores ruin each other, and results stay bit-stable."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
