"""The same kernels with blocks on threads of the operating system, under ThreadSanitizer."""
