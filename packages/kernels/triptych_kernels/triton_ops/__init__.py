"""Triton kernels of the ops; imported only where one runs.

The rules they share, so that they also run under TRITON_INTERPRET=1 on a CPU: upcast right after
each load (the interpreter computes bfloat16 wrong), no libdevice, no `.to()` on Python scalars.
"""
