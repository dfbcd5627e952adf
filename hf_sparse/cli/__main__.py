"""``python -m hf_sparse.cli``."""

import sys

from hf_sparse.cli.program import main

sys.exit(main())
