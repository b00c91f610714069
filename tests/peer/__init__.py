"""The parity suite: our pictures against those of stable-diffusion.cpp, from the same files.

    python -m tests.peer.parity          from the top of the repository; see that module
"""
