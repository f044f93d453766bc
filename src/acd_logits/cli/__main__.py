"""`python -m acd_logits.cli` is `acd-logits`."""

import sys

from . import main

sys.exit(main())
