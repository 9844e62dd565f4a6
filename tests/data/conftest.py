from __future__ import annotations

from pathlib import Path

import pytest

from instseg.data.synthetic import write_synthetic_devkit


@pytest.fixture(scope="session")
def devkit(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A generated devkit of four training and two validation images; tests that damage it copy it first."""
    root = tmp_path_factory.mktemp("devkit")
    write_synthetic_devkit(str(root), num_train=4, num_val=2, seed=3, size=(64, 96))
    return root
