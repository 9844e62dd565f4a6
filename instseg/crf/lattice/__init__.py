"""The permutohedral lattice (Adams, Baek, Davis 2010): Gaussian filtering in time linear in pixels and labels.

A lattice is built once per image. It is three fixed sparse maps, splat (pixels to vertices), blur (along each of the
C+1 lattice directions) and slice (vertices to pixels), so that it serves every mean-field iteration, the backward pass,
and both CRFs. Several kernels, each with its own features, lie side by side in one lattice: their corners are columns
of the same arrays, so that a pixel is read and written once per iteration. Several images lie one after another.

    base.py            the maps, a mean-field step and a whole inference made of them, their gradients
    embedding.py       where a point lies in the lattice, keys of vertices
    torch_backend.py   anywhere; the reference
    numba_backend.py   on a CPU: building, and numba_lattice.py, the maps; compiled loops in build_loops.py,
                       filter_loops.py and softmax_loops.py, written with the vectors of simd.py; rows.py, threads.py,
                       memory.py
    triton_backend.py  on a GPU
"""

from instseg.crf.lattice.base import Lattice, build_lattice, pixel_major, softmax, softmax_backward, zeros
from instseg.crf.lattice.embedding import check_features

__all__ = ["Lattice", "build_lattice", "check_features", "pixel_major", "softmax", "softmax_backward", "zeros"]
