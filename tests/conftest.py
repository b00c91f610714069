"""What holds for every test."""

from __future__ import annotations

import os
import signal

# A shell starts what it puts into the background with SIGINT ignored, and processes hand that on to their children:
# tests that interrupt one would wait for ever.
signal.signal(signal.SIGINT, signal.default_int_handler)

# In a build with Vulkan too the suite computes on the processor, also where `auto` is asked for, and no driver takes
# memory that tests measure; tests/test_vulkan.py shows its processes a device. Loaders of Vulkan before 1.3.234 do not
# know the first variable: the second is ggml's.
os.environ |= {"VK_LOADER_DRIVERS_DISABLE": "*", "GGML_VK_VISIBLE_DEVICES": ""}
