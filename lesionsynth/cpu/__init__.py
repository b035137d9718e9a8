"""CPU twin: Numba kernels, one module per stage of DESIGN.md section 2."""
