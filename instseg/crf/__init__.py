"""Dense CRFs with higher-order detection potentials (paper 3.1-3.3).

Torch, and what makes the kernels' lattice (instseg/lattice/) fast; no Ray, no files, no OpenCV.

One sign convention: a potential is an energy in nats, P(x) ~ exp(-E(x)). A message is the derivative of
the expected energy by Q_i(l), and an update is log Q_i(l) = -(unary energy) - sum of messages - log Z. `unary`,
`energy` and `message` are energies; what is a probability's logarithm has `log` in its name.

Dimension letters: N pixels (row-major), L labels, D detections, C features, M lattice vertices. Marginals are
pixel-major (N, L), so that filters and softmax read contiguous rows. Images are RGB 0..255.

    exact.py        the kernels by brute force
    pairwise.py     k(i, j), normalisation, compatibility  section 3.1
    dense.py        DenseCRF: unary and pairwise terms     section 3.1
    detection.py    psi_d and the latent Y_d               Eq. 2
    higher_order.py HigherOrderCRF: all terms              Eq. 3
    mean_field.py   one step, the loop, the free energy
    identify.py     Pr(v_i = k)                            Eq. 4
    instance.py     InstanceCRF                            Eq. 5
"""

from instseg.crf.dense import DenseCRF
from instseg.crf.higher_order import HigherOrderCRF
from instseg.crf.identify import identify
from instseg.crf.instance import InstanceCRF

__all__ = ["DenseCRF", "HigherOrderCRF", "InstanceCRF", "identify"]
