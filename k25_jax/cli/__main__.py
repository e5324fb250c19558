"""`python -m k25_jax.cli` is `k25`."""

import sys

from k25_jax.cli import main

sys.exit(main())
