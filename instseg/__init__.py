"""Instance segmentation from semantic segmentation and detections (Arnab & Torr, BMVC 2016).

The model, paper symbol by module:

    U(x_i)                semantic logits                  models/semantic.py, models/network.py
    psi_P(x_i, x_j)       dense pairwise term              crf/pairwise.py, lattice/
    psi_d(x_d, y_d), Y_d  detection potential, validity    crf/detection.py
    E(x, y)               higher-order CRF, Eq. 3          crf/higher_order.py
    F_d                   foreground: GrabCut, learned     data/foreground.py, models/foreground.py
    psi_U(y_d)            the detector's score, learned    crf/detection.py, models/validity.py
    Q, Pr(Y)              mean-field marginals             crf/mean_field.py
    Pr(v_i = k)           identification, Eq. 4            crf/identify.py
    E(v)                  instance CRF, Eq. 5              crf/instance.py
    Figure 2              all of it as one module          models/network.py
    AP^r                  evaluation                       evaluation/ap_r.py
"""

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from instseg.config import ModelConfig
    from instseg.crf import DenseCRF
    from instseg.models.network import InstanceNetwork
    from instseg.models.segment import segment_instances
    from instseg.structures import Detections, InstanceMap, Sample

_MODULES = {
    "ModelConfig": "instseg.config",
    "DenseCRF": "instseg.crf",
    "InstanceNetwork": "instseg.models.network",
    "segment_instances": "instseg.models.segment",
    "Detections": "instseg.structures",
    "InstanceMap": "instseg.structures",
    "Sample": "instseg.structures",
}
__all__ = [
    "DenseCRF",
    "Detections",
    "InstanceMap",
    "InstanceNetwork",
    "ModelConfig",
    "Sample",
    "segment_instances",
]


def __getattr__(name: str) -> Any:
    # Lazy, because torch takes seconds and 500 MB that preparing data and reading --help do without.
    if name not in _MODULES:
        raise AttributeError(f"module 'instseg' has no attribute {name!r}")
    return getattr(import_module(_MODULES[name]), name)
