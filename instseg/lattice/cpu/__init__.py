"""The lattice on a CPU: loops compiled by numba, the same results, bit for bit, at any number of threads.

backend.py        building a lattice
lattice.py        its maps, and whole mean-field steps
rows.py           rows of labels as the loops want them, and their softmax
build_loops.py, filter_loops.py, softmax_loops.py   what is compiled (compile.py), with the vectors of simd.py
threads.py        parts of a loop on several threads
"""
