"""`python -m fanformer` is the command `fanformer`."""

import sys

from fanformer.cli.main import main

if __name__ == "__main__":
    sys.exit(main())
