"""The CUDA kernels' own source, compiled for the host and run on NumPy memory."""
