"""What results made of some images, once more: results hold scores, not masks, so their networks are run again."""

from __future__ import annotations

import functools
import sys
from collections.abc import Mapping

import torch

from instseg.config import AblateConfig, Ablation, ModelConfig
from instseg.data.dataset import PreparedDataset
from instseg.data.files import read_json
from instseg.evaluation.ap_r import ap_r, image_record
from instseg.jobs.evaluate import build_network
from instseg.jobs.progress import progress
from instseg.models.checkpoint import from_json
from instseg.models.network import InstanceNetwork
from instseg.report.comparison import Result
from instseg.report.comparison_panel import Pair
from instseg.storage import StoragePath
from instseg.structures import InstanceMap, Sample

_SAME = 0.5  # percent of AP^r_vol of one image; GPUs and other versions of libraries round otherwise


def redraw(first: Result, other: Result, scores: Mapping[str, tuple[float, float]]) -> list[Pair]:
    """Segment some images as both results did, on the CPU.

    Warns, and leaves out what cannot be drawn: all images where the data or a checkpoint is not there any more, an
    image that now comes out otherwise than it was recorded.

    Args:
        first: A result.
        other: Another, with the same images.
        scores: AP^r_vol of each image in both, in percent.
    """
    pairs: list[Pair] = []
    try:
        reruns = [_Rerun(result) for result in (first, other)]
        for image, expected in progress(scores.items(), len(scores), f"drawn images of {other.name}"):
            samples, maps, now = zip(*(rerun(image) for rerun in reruns), strict=True)
            unlike = [abs(one - before) > _SAME for one, before in zip(now, expected, strict=True)]
            if any(unlike):
                result = (first, other)[unlike.index(True)]
                _warn(f"{image} is not drawn: {result.name} does not come to what it recorded; was it other code?")
            else:
                pairs.append(Pair(samples[0], maps, expected))
    except (FileNotFoundError, ValueError) as error:
        _warn(f"no more images of {other.name} are drawn: {error}")
    return pairs


class _Rerun:
    """The network of a result, and the data that it was evaluated on."""

    def __init__(self, result: Result) -> None:
        config = result.content["config"]
        self._config = config
        self._dataset = PreparedDataset(config["data"])
        if self._dataset.digest != result.content.get("data_digest"):
            raise ValueError(f"{config['data']}: is not what {result.name} was evaluated on any more")
        self._model, self._ablation = from_json(ModelConfig, config["model"]), from_json(Ablation, config["ablation"])
        self._index = {image: index for index, image in enumerate(self._dataset.image_ids)}
        self._network = functools.cache(self._build)

    @torch.inference_mode()
    def __call__(self, image: str) -> tuple[Sample, InstanceMap, float]:
        """The sample, its instances and their AP^r_vol in percent."""
        sample, network = self._dataset[self._index[image]], self._network(self._checkpoint(image))
        found = network.instance_map(network(sample, self._ablation), self._ablation)
        if found.semantic is None:
            raise ValueError(f"{image}: expected a semantic segmentation")
        record = image_record(sample, found, found.semantic, self._dataset.num_labels)
        return sample, found, 100 * ap_r([record], self._dataset.num_labels).mean_volume

    def _checkpoint(self, image: str) -> str | None:
        """In a cross-validation that of the fold which the image was held out of."""
        if "checkpoint" in self._config:
            return self._config["checkpoint"]
        out = StoragePath.of(self._config["out"])
        return str(out / f"fold_{read_json(out / 'crossvalidation.json')['folds'][image]}" / "run")

    def _build(self, checkpoint: str | None) -> InstanceNetwork:
        config = AblateConfig(self._config["data"], "", checkpoint, self._model)
        return build_network(config, self._dataset).eval()


def _warn(text: str) -> None:
    print(f"warning: {text}", file=sys.stderr, flush=True)
