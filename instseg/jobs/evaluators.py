"""Inference and scoring in parallel Ray actors.

Each image is computed by one actor on one thread, and travels as a record that is independent of all others, so
the result is the same for any number of actors and any order.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Protocol

import numpy as np
import ray
from ray.exceptions import RayTaskError
from ray.util import ActorPool

from instseg.config import ModelConfig
from instseg.evaluation.ap_r import ImageRecord, image_record
from instseg.jobs.progress import follow
from instseg.structures import InstanceMap, Sample

MAX_RESTARTS = 3  # of an actor whose process dies, e.g. for lack of memory

# The instances with the refined semantic segmentation, and the (H, W) semantic segmentation before the CRF.
Predict = Callable[[Sample], tuple[InstanceMap, np.ndarray]]
Build = Callable[[ModelConfig, int, Mapping[str, np.ndarray]], Predict]


class Dataset(Protocol):
    """Samples with random access, cheap to send to another process, as `instseg.data.dataset.PreparedDataset`."""

    image_ids: tuple[str, ...]
    num_labels: int

    def __len__(self) -> int: ...
    def __getitem__(self, index: int) -> Sample: ...


class Evaluators:
    """A pool of actors, in a running Ray cluster, that hold the data set and a network.

    Args:
        dataset: What to evaluate on.
        build: Makes a network from its configuration, number of labels and parameters.
        num_actors: Default: one for each CPU. With GPUs in the cluster, the actors share them evenly.

    Raises:
        ValueError: If there are more actors than CPUs or the data set is empty.
    """

    def __init__(self, dataset: Dataset, build: Build, num_actors: int | None = None) -> None:
        if not len(dataset):
            raise ValueError("data: expected at least one image, got none")
        num_cpus = int(ray.cluster_resources().get("CPU", 0))
        num_actors = num_actors or min(num_cpus, len(dataset))
        if num_actors > num_cpus:
            raise ValueError(f"num_actors: expected at most the cluster's {num_cpus} CPUs, got {num_actors}")
        num_gpus = min(1.0, ray.cluster_resources().get("GPU", 0) / num_actors)
        actor = ray.remote(num_cpus=1, num_gpus=num_gpus, max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS)(
            _Evaluator
        )
        self._dataset = dataset
        self._actors: list[Any] = [actor.remote(dataset, build) for _ in range(num_actors)]
        self._network: tuple[int, ModelConfig, Any] | None = None

    def use(self, model: ModelConfig, state: Mapping[str, np.ndarray]) -> None:
        """Set the network by its configuration and its parameters by name, which are stored once for all actors."""
        previous = self._network[0] if self._network else 0
        self._network = (previous + 1, model, ray.put(dict(state)))

    def records(self) -> list[ImageRecord]:
        """Evaluate every image, sorted by image id.

        Raises:
            ValueError: If an image or the network's parameters are unfit; names the image.
            RuntimeError: If an image fails otherwise; names the image.
        """
        indices = range(len(self._dataset))
        records = follow(self._map("record", indices), len(indices), "evaluated images")
        records = sorted(records, key=lambda record: record.image_id)
        if [record.image_id for record in records] != sorted(self._dataset.image_ids):
            raise AssertionError(f"expected {len(indices)} images, each once, got {len(records)} records")
        return records

    def instance_maps(self, indices: Sequence[int]) -> list[InstanceMap]:
        """Segment some images, in the order of `indices`. Raises as `records`."""
        maps = dict(self._map("segment", indices))
        return [maps[index] for index in indices]

    def _map(self, method: str, indices: Sequence[int]) -> Any:
        network = self._network
        if network is None:
            raise RuntimeError("no network: call `use` first")
        pool = ActorPool(self._actors)
        try:
            yield from pool.map_unordered(lambda actor, i: getattr(actor, method).remote(i, *network), list(indices))
        except RayTaskError as error:
            raise error.cause from error

    def __enter__(self) -> Evaluators:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for actor in self._actors:
            ray.kill(actor)


class _Evaluator:
    """The actor. Every call says which network it wants, because a restarted actor has forgotten."""

    def __init__(self, dataset: Dataset, build: Build) -> None:
        import torch

        torch.set_num_threads(1)
        self._dataset = dataset
        self._build = build
        self._network_id = 0
        self._predict: Predict | None = None

    def record(self, index: int, *network: Any) -> ImageRecord:
        return self._named(index, lambda: self._record(index, *network))

    def segment(self, index: int, *network: Any) -> tuple[int, InstanceMap]:
        return index, self._named(index, lambda: self._network(*network)(self._dataset[index])[0])

    def _record(self, index: int, *network: Any) -> ImageRecord:
        sample = self._dataset[index]
        predicted, semantic_before = self._network(*network)(sample)
        return image_record(sample, predicted, semantic_before, self._dataset.num_labels)

    def _network(self, network_id: int, model: ModelConfig, state: Mapping[str, np.ndarray]) -> Predict:
        if self._predict is None or network_id != self._network_id:
            self._predict = self._build(model, self._dataset.num_labels, state)
            self._network_id = network_id
        return self._predict

    def _named(self, index: int, work: Callable[[], Any]) -> Any:
        """Run and add the image's id to the message of whatever is raised."""
        image_id = self._dataset.image_ids[index]
        try:
            return work()
        except ValueError as error:
            text = str(error)
            raise ValueError(text if image_id in text else f"{image_id}: {text}") from error
        except Exception as error:
            raise RuntimeError(f"{image_id}: {type(error).__name__}: {error}") from error
