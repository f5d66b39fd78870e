"""`python -m orpo`, for launchers that want one: `torchrun --nproc_per_node 8 -m orpo train recipe.yaml`."""

import sys

from orpo.cli import main

sys.exit(main())
