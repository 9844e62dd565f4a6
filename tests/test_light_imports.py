"""What a light installation lacks is not imported: it has torch, NumPy, numba, OpenCV and safetensors alone."""

from __future__ import annotations

import subprocess
import sys

HEAVY = {
    "ray", "mlflow", "pyarrow", "pandas", "scipy", "pycocotools", "torchvision", "PIL", "matplotlib", "tyro", "rich",
    "jaxtyping", "beartype",
}  # fmt: skip
BLOCK = """
import sys
from importlib.machinery import PathFinder
class Light(PathFinder):
    @classmethod
    def find_spec(cls, name, *arguments):
        return None if name.split(".")[0] in {absent} else super().find_spec(name, *arguments)
sys.meta_path[sys.meta_path.index(PathFinder)] = Light
"""
USE = """
import numpy as np
from instseg import DenseCRF, Detections, segment_instances
from instseg.models.network import InstanceNetwork
image, probabilities = np.full((12, 16, 3), 9, np.uint8), np.full((3, 12, 16), 1 / 3)
image[3:9, 4:12] = 200
q = DenseCRF(3)(image, -np.log(probabilities))
detections = Detections([1], [0.9], [[3, 2, 13, 10]])
assert segment_instances(image, probabilities, detections).instances.shape == (12, 16)
"""


def run(script: str) -> str:
    done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_the_python_api_runs_in_a_light_installation():
    run(BLOCK.format(absent=HEAVY) + USE)


def test_the_dense_crf_needs_no_numba_and_no_opencv():
    script = """
import numpy as np
from instseg import DenseCRF
DenseCRF(2)(np.zeros((3, 4, 3), np.uint8), np.zeros((2, 3, 4)))
"""
    run(BLOCK.format(absent=HEAVY | {"numba", "cv2", "safetensors"}) + script)


def test_importing_the_crf_imports_torch_and_its_own_part_of_the_package_alone():
    """Besides what torch and NumPy import by themselves."""
    listing = (
        "import sys, numpy, torch; before = set(sys.modules); import instseg.crf; print(*set(sys.modules) - before)"
    )
    names = {name for name in run(listing).split() if name.split(".")[0] not in sys.stdlib_module_names}
    assert {name.split(".")[0] for name in names} <= {"torch", "numpy", "instseg"}
    assert {name.split(".")[1] for name in names if name.startswith("instseg.")} == {
        "crf", "lattice", "config", "checks", "shapes",
    }  # fmt: skip
