"""Where PASCAL VOC 2012, SBD and COCO are published, and what of them is needed where.

The checksums are published too: MD5 of VOC and SBD in torchvision's `datasets`, SHA-256 of COCO in its prototype
`datasets/_builtin/coco.py`.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

from instseg.config import DataSetName


@dataclass(frozen=True)
class PublishedFile:
    """One file to download.

    Attributes:
        name: Of the file, by which it is looked for in folders and at mirrors.
        urls: Where it is published, tried in turn.
        checksum: "md5:" or "sha256:" and the digest in hexadecimal.
        contents: Pairs of a file or folder in the archive and its path in the folder of all data sets. Each appears
            whole or not at all. An empty first half means the file itself, which is no archive.
    """

    name: str
    urls: tuple[str, ...]
    checksum: str
    contents: tuple[tuple[str, str], ...]


@dataclass(frozen=True)
class DataSet:
    """What a data set consists of, and the options with which prepare reads it, {out} being the folder of all."""

    files: tuple[PublishedFile, ...]
    options: str


_VOC = PublishedFile(
    "VOCtrainval_11-May-2012.tar",
    (
        "http://host.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
        "https://thor.robots.ox.ac.uk/pascal/VOC/voc2012/VOCtrainval_11-May-2012.tar",
    ),
    "md5:6cd6e144f989b92b3379bac3b3de84fd",
    tuple(
        (f"VOCdevkit/VOC2012/{part}", f"VOCdevkit/VOC2012/{part}")
        for part in ("JPEGImages", "SegmentationClass", "SegmentationObject", "Annotations", "ImageSets/Segmentation")
    ),
)
_SBD = PublishedFile(
    "benchmark.tgz",
    ("https://www2.eecs.berkeley.edu/Research/Projects/CS/vision/grouping/semantic_contours/benchmark.tgz",),
    "md5:82b4d87ceb2ed10f6038a1cba92111cb",
    tuple(
        (f"benchmark_RELEASE/dataset/{part}", f"sbd/{part}") for part in ("img", "cls", "inst", "train.txt", "val.txt")
    ),
)
_SBD_NOVAL = PublishedFile(
    "train_noval.txt",
    (
        "https://www.cs.cornell.edu/~bharathh/train_noval.txt",
        "http://home.bharathh.info/pubs/codes/SBD/train_noval.txt",
    ),
    "md5:79bff800c5f0b1ec6b21080a3c066722",
    (("", "sbd/train_noval.txt"),),
)


def _coco(path: str, sha256: str, *contents: str) -> PublishedFile:
    """The second URL is the first one's store by its own name, which has a certificate."""
    name = path.rpartition("/")[2]
    urls = (f"http://images.cocodataset.org/{path}", f"https://s3.amazonaws.com/images.cocodataset.org/{path}")
    return PublishedFile(name, urls, f"sha256:{sha256}", tuple((inside, f"coco/{inside}") for inside in contents))


def _coco_annotations(year: int, sha256: str) -> PublishedFile:
    instances = (f"annotations/instances_{part}{year}.json" for part in ("train", "val"))
    return _coco(f"annotations/annotations_trainval{year}.zip", sha256, *instances)


def _coco_split(split: str, sha256: str, annotations: PublishedFile) -> DataSet:
    options = f"--coco {{out}}/coco/annotations/instances_{split}.json --images {{out}}/coco/{split}"
    return DataSet((_coco(f"zips/{split}.zip", sha256, split), annotations), options)


_COCO_2014 = _coco_annotations(2014, "031296bbc80c45a1d1f76bf9a90ead27e94e99ec629208449507a4917a3bf009")
_COCO_2017 = _coco_annotations(2017, "113a836d90195ee1f884e704da6304dfaaecff1f023f49b6ca93c4aaae470268")

DATA_SETS: Mapping[DataSetName, DataSet] = {
    "voc": DataSet((_VOC,), "--devkit {out}/VOCdevkit --split train"),
    "sbd": DataSet((_SBD, _SBD_NOVAL), "--sbd {out}/sbd --split train_noval"),
    "coco-train2014": _coco_split(
        "train2014", "ede4087e640bddba550e090eae701092534b554b42b05ac33f0300b984b31775", _COCO_2014
    ),
    "coco-val2014": _coco_split(
        "val2014", "fe9be816052049c34717e077d9e34aa60814a55679f804cd043e3cbee3b9fde0", _COCO_2014
    ),
    "coco-train2017": _coco_split(
        "train2017", "69a8bb58ea5f8f99d24875f21416de2e9ded3178e903f1f7603e283b9e06d929", _COCO_2017
    ),
    "coco-val2017": _coco_split(
        "val2017", "4f7e2ccb2866ec5041993c9cf2a952bbed69647b115d0f74da7ce8f4bef82f05", _COCO_2017
    ),
}
