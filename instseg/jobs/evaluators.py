"""Inference and scoring in parallel Ray actors.

Each image is computed by one actor on one thread, and travels as a record that is independent of all others, so
the result is the same for any number of actors and any order.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import replace
from types import TracebackType
from typing import Any, TypeVar

import numpy as np
import ray
import torch
from ray.exceptions import RayActorError, RayTaskError
from ray.util import ActorPool

from instseg.config import Ablation, ModelConfig
from instseg.data.dataset import PreparedDataset
from instseg.evaluation.ap_r import ImageRecord, image_record
from instseg.evaluation.oracles import AFTER_THE_HEAD, Oracle
from instseg.jobs.cluster import JobError
from instseg.jobs.devices import EvaluatorPlan, Processor
from instseg.jobs.progress import progress
from instseg.models.network import InstanceNetwork
from instseg.report.cells import shrink_map
from instseg.report.gallery import Selection, Shown
from instseg.structures import InstanceMap

MAX_RESTARTS = 3  # of an actor whose process dies, e.g. for lack of memory
Result = TypeVar("Result")


class Evaluators:
    """A pool of actors, in a running Ray cluster, that hold the data set and a network. A context manager.

    Args:
        dataset: What to evaluate on.
        network: Whose parameters are stored once for all actors.
        plan: How many actors, and on what; see `plan_evaluators`.
    """

    def __init__(self, dataset: PreparedDataset, network: InstanceNetwork, plan: EvaluatorPlan) -> None:
        resources = {"num_cpus": 1, "num_gpus": plan.gpus_per_actor}
        actor = ray.remote(**resources, max_restarts=MAX_RESTARTS, max_task_retries=MAX_RESTARTS)(_Evaluator)
        self._dataset = dataset
        # Goes with each task: as an argument of the actors it could be lost to those that restart, says Ray, aloud.
        self._state = ray.put({name: tensor.cpu().numpy() for name, tensor in network.state_dict().items()})
        arguments = (dataset, network.config, plan.device)
        self._actors: list[Any] = [actor.remote(*arguments) for _ in range(plan.num_actors)]

    def records(
        self, ablation: Ablation, oracle: Oracle | None = None, selection: Selection | None = None
    ) -> list[ImageRecord]:
        """Evaluate every image with what `ablation` leaves of the network, sorted by image id.

        Args:
            ablation: What takes part.
            oracle: Puts the truth in the place of a part of each sample; see `instseg.evaluation.oracles`.
            selection: Is offered every image.

        Raises:
            ValueError: If an image or the network's parameters are unfit; names the image.
            RuntimeError: If an image fails otherwise; names the image.
            JobError: If an actor dies more often than `MAX_RESTARTS`, or finds no GPU where one was promised.
        """
        indices = range(len(self._dataset))
        found = self._map("record", indices, self._state, ablation, oracle, selection is not None)
        records = []
        for record, predicted in progress(found, len(indices), "evaluated images"):
            records.append(record)
            if selection is not None:
                selection.offer(Shown(record, predicted))
        records.sort(key=lambda record: record.image_id)
        if [record.image_id for record in records] != sorted(self._dataset.image_ids):
            raise AssertionError(f"expected {len(indices)} images, each once, got {len(records)} records")
        return records

    def _map(self, method: str, indices: Sequence[int], *arguments: Any) -> Iterator[Any]:
        pool = ActorPool(self._actors)
        try:
            yield from pool.map_unordered(lambda actor, i: getattr(actor, method).remote(i, *arguments), list(indices))
        except RayTaskError as error:
            raise error.cause from error
        except RayActorError as error:  # its last line says why
            raise JobError(f"an evaluator died: {str(error).strip().splitlines()[-1]}") from error

    def __enter__(self) -> Evaluators:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for actor in self._actors:
            ray.kill(actor)


class _Evaluator:
    """The actor. Its network gets its parameters with the first image."""

    def __init__(self, dataset: PreparedDataset, config: ModelConfig, device: Processor) -> None:
        torch.set_num_threads(1)
        self._dataset = dataset
        network = InstanceNetwork(replace(config, semantic_weights=None), dataset.num_labels)
        self._network = network.to("cuda" if device == "gpu" else "cpu").eval()
        self._is_loaded = False

    def record(
        self,
        index: int,
        state: Mapping[str, np.ndarray],
        ablation: Ablation,
        oracle: Oracle | None = None,
        show: bool = False,
    ) -> tuple[ImageRecord, InstanceMap | None]:
        if not self._is_loaded:
            self._network.load_state_dict({name: torch.tensor(array) for name, array in state.items()})
            self._is_loaded = True
        record, predicted = self._named(index, lambda: self._record(index, ablation, oracle))
        return record, shrink_map(predicted) if show else None

    @torch.inference_mode()
    def _record(self, index: int, ablation: Ablation, oracle: Oracle | None) -> tuple[ImageRecord, InstanceMap]:
        sample, network = self._dataset[index], self._network
        logits = network.semantic_logits(sample)
        if oracle is not None:
            sample = replace(sample, logits=logits.cpu().numpy())
            if ablation.detection_head and oracle in AFTER_THE_HEAD:
                sample, ablation = network.as_given(sample, logits), replace(ablation, detection_head=False)
            sample = oracle(sample)
            logits = torch.from_numpy(sample.logits).to(logits)
        output = network(sample, ablation, logits)
        predicted, semantic_before = network.instance_map(output, ablation), output.semantic_logits.argmax(0)
        arrays = semantic_before.cpu().numpy(), self._dataset.num_labels, output.validity.cpu().numpy()
        return image_record(sample, predicted, *arrays), predicted

    def _named(self, index: int, work: Callable[[], Result]) -> Result:
        """Run and add the image's id to the message of whatever is raised."""
        image_id = self._dataset.image_ids[index]
        try:
            return work()
        except ValueError as error:
            text = str(error)
            raise ValueError(text if image_id in text else f"{image_id}: {text}") from error
        except Exception as error:
            raise RuntimeError(f"{image_id}: {type(error).__name__}: {error}") from error
