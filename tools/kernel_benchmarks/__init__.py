"""The benchmarks behind tools/bench_kernels.py; `registry.OPS` lists them."""
