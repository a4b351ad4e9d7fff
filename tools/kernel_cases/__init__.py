"""The inputs on which tools/check_kernels_gpu.py checks each op; `registry.CASES` lists them."""
