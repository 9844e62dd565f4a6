"""The permutohedral lattice (Adams, Baek, Davis 2010): Gaussian filtering in time linear in pixels and labels.

A lattice is built once per image. It is three fixed sparse maps, splat (pixels to vertices), blur (along each of the
C+1 lattice directions) and slice (vertices to pixels), so that it serves every mean-field iteration, the backward pass,
and both CRFs. Several kernels, each with its own features, lie side by side in one lattice: their corners are columns
of the same arrays, so that a pixel is read and written once per iteration. Several images lie one after another.

    operator.py        the maps, a mean-field step and a whole inference made of them, their gradients
    embedding.py       where a point lies in the lattice, keys of vertices
    backends.py        who builds the lattice of an image: that of its device
    torch_backend.py   anywhere; the reference
    triton_backend.py  on a GPU
    cpu/               on a CPU: loops compiled by numba
    memory.py          memory of a CPU that is kept for the next image
"""

from instseg.lattice.backends import build_lattice, pixel_major, softmax
from instseg.lattice.embedding import check_features
from instseg.lattice.operator import Lattice

__all__ = ["Lattice", "build_lattice", "check_features", "pixel_major", "softmax"]
