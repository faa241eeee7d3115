"""The tests run on the CPU: they hold runs to the bit, and start two processes where there may be one GPU."""

import os

os.environ.setdefault("CUDA_VISIBLE_DEVICES", "")
if not os.environ["CUDA_VISIBLE_DEVICES"]:
    os.environ.setdefault("TRITON_INTERPRET", "1")  # before anything imports triton, where that is installed
