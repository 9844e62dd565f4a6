"""Dense CRFs with higher-order detection potentials (paper 3.1-3.3).

Torch, and numba or triton for speed; no Ray, no files, no OpenCV.

One sign convention: a potential is an energy in nats, P(x) ~ exp(-E(x)). A message is the derivative of
the expected energy by Q_i(l), and an update is log Q_i(l) = -(unary energy) - sum of messages - log Z.

Dimension letters: N pixels (row-major), L labels, D detections, C features, M lattice vertices. Marginals are
pixel-major (N, L), so that filters and softmax read contiguous rows. Images are RGB 0..255.

    lattice/        permutohedral lattice                  Adams et al. 2010
                    with its backends for CPUs, for GPUs, and in plain torch for anywhere
    exact.py        the kernels by brute force
    pairwise.py     k(i, j), normalisation, compatibility  section 3.1
    detection.py    psi_d and the latent Y_d               Eq. 2-3
    mean_field.py   one step, the loop, the free energy
    dense.py        DenseCRF, HigherOrderCRF               section 3.2
    identify.py     Pr(v_i = k)                            Eq. 4
    instance.py     InstanceCRF                            Eq. 5
"""

from instseg.crf.dense import DenseCRF, HigherOrderCRF
from instseg.crf.identify import identify
from instseg.crf.instance import InstanceCRF

__all__ = ["DenseCRF", "HigherOrderCRF", "InstanceCRF", "identify"]
