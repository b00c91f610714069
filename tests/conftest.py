"""What holds for every test."""

from __future__ import annotations

import signal

# A shell starts what it puts into the background with SIGINT ignored, and processes hand that on to their children:
# tests that interrupt one would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)
