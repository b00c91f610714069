"""`python -m pyggml` is the command `pyggml`: the one place where a lower package names a higher one."""

import sys

from studio.cli import main

sys.exit(main())
