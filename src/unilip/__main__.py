"""`python -m unilip` is `unilip`."""

import sys

from unilip.cli import main

if __name__ == "__main__":
    sys.exit(main())
