"""How the CPU twin gets fast: vectors, lines, masks of bits, rows, threads, memory, compilation.

What it computes is in `lesionsynth.cpu`, one module a stage.
"""
