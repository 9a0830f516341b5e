"""`python -m unilip.cli`, the same as `unilip`."""

import sys

from unilip.cli import main

sys.exit(main())
