"""The commands: options in, one run of a workflow, and whatever a user can cause as one line and an exit status.

Torch, Ray and MLflow take seconds to import, which --help and mistyped options are spared.
"""

from __future__ import annotations

import argparse
import errno
import sys
from collections.abc import Callable
from dataclasses import replace
from importlib import import_module
from inspect import getdoc
from typing import Any, TypeVar

try:
    import tyro
except ModuleNotFoundError:
    print("error: this command needs instseg[jobs]: pip install 'instseg[jobs]'", file=sys.stderr)
    sys.exit(2)

from instseg.config import (
    AblateConfig,
    CompareConfig,
    DemoConfig,
    EvaluateConfig,
    FetchConfig,
    InspectConfig,
    ModelConfig,
    PredictConfig,
    PrepareConfig,
    TrainConfig,
)
from instseg.jobs.cluster import JobError
from instseg.recipes import RECIPES, find_recipe

MISTAKE, INTERRUPTED = 2, 130  # exit statuses
Config = TypeVar("Config", bound=AblateConfig)


def fetch() -> None:
    """Download PASCAL VOC, SBD and COCO: resumed, checked, safely unpacked into the folders that prepare reads.

    Example: workflows/fetch.py --out data --datasets voc sbd
    """
    _run("fetch", lambda: tyro.cli(FetchConfig, description=getdoc(fetch)))


def prepare() -> None:
    """Prepare a data directory: images, ground truth, logits and detections with foregrounds, as Parquet shards.

    Example: workflows/prepare.py --images photographs --detector fasterrcnn_resnet50_fpn --out runs/photographs
    """
    _run("prepare", lambda: tyro.cli(PrepareConfig, description=getdoc(prepare)))


def inspect() -> None:
    """Look at a prepared data directory: what is in it, and a contact sheet of random images.

    Example: workflows/inspect.py --data runs/voc/val --out runs/look
    """
    _run("inspect", lambda: tyro.cli(InspectConfig, description=getdoc(inspect)))


def train() -> None:
    """Train on a prepared data directory: checkpoints and an MLflow run.

    Example: workflows/train.py --data runs/voc/train --out runs/voc/run
    """
    _run("train", lambda: _parse_training(getdoc(train)))


def evaluate() -> None:
    """Evaluate a network on a prepared data set: AP^r and mean IoU, a report and an MLflow run.

    Example: workflows/evaluate.py --data runs/voc/val --checkpoint runs/voc/run --out runs/voc/evaluation
    """
    _run("evaluate", lambda: _parse_evaluation(EvaluateConfig, getdoc(evaluate)))


def predict() -> None:
    """Segment photographs, or a prepared data set: masks as PNGs and COCO results.

    Example: workflows/predict.py --images photographs --recipe pretrained --out masks
    """
    _run("predict", lambda: tyro.cli(PredictConfig, description=getdoc(predict)))


def ablate() -> None:
    """Evaluate the rows of the paper's Table 1, and two simpler methods, side by side.

    Example: workflows/ablate.py --data runs/voc/val --checkpoint runs/voc/run --out runs/voc/ablation
    """
    _run("ablate", lambda: _parse_evaluation(AblateConfig, getdoc(ablate)))


def crossvalidate() -> None:
    """Train once for each of --num-folds parts of a data set, without it, and evaluate all images held out together.

    Example: workflows/crossvalidate.py --data runs/voc/trainval --out runs/voc/folds --num-folds 5
    """
    _run("crossvalidate", lambda: _parse_training(getdoc(crossvalidate)))


def compare() -> None:
    """Compare results: is one better than another, by how much, and on which images?

    Example: workflows/compare.py runs/voc/evaluation runs/another/evaluation
    """
    options = (tyro.conf.PositionalRequiredArgs,)
    _run("compare", lambda: tyro.cli(CompareConfig, description=getdoc(compare), config=options))


def demo() -> None:
    """The whole system on a generated data set, in minutes on two cores: prepare, train, ablate.

    Example: workflows/demo.py --out runs/demo
    """
    _run("demo", lambda: tyro.cli(DemoConfig, description=getdoc(demo)))


def _run(job: str, parse: Callable[[], Any]) -> None:
    """Run a workflow. Mistakes and failures of the machine are one line; any other exception is a bug, and raised."""
    out = "."
    try:
        config = parse()
        out = config.out
        getattr(import_module(f"instseg.jobs.{job}"), job)(config)
    except KeyboardInterrupt:
        _leave("interrupted", INTERRUPTED)
    except OSError as error:
        _leave(f"error: {_explain(error, out)}", MISTAKE)
    except (ValueError, FloatingPointError, JobError) as error:
        _leave(f"error: {error}", MISTAKE)


def _leave(message: str, status: int) -> None:
    print(" ".join(message.split()), file=sys.stderr)
    sys.exit(status)


def _explain(error: OSError, out: str) -> str:
    """A full disk with its folder; the file before what is wrong with it."""
    if error.errno == errno.ENOSPC:
        return f"no space left on the disk of {error.filename or out}; make room and run the same command again"
    return str(error) if error.filename is None else f"{error.filename}: {error.strerror}"


def _parse_training(description: str | None) -> TrainConfig:
    """The recipe decides what the other options default to, so it is read before them."""
    name, arguments = _taken("--recipe")
    recipe = find_recipe(name or RECIPES[0].__name__)
    recipes = "\n".join(f"  {(getdoc(recipe) or '').splitlines()[0]}" for recipe in RECIPES)
    description = f"{description}\n\n--recipe NAME (default {RECIPES[0].__name__}) sets the defaults below:\n{recipes}"
    default = recipe(tyro.MISSING, tyro.MISSING)
    return tyro.cli(TrainConfig, default=default, description=description, args=arguments)


def _parse_evaluation(kind: type[Config], description: str | None) -> Config:
    """The checkpoint decides what the options of the model default to, so it is read before them."""
    path, arguments = _taken("--checkpoint")
    default = kind(tyro.MISSING, tyro.MISSING, model=ModelConfig())
    if path is not None:
        from instseg.models.checkpoint import INITIAL_WEIGHTS, find_checkpoint, from_json

        checkpoint = find_checkpoint(path)
        for name in INITIAL_WEIGHTS:
            _refuse(f"--model.{name}", arguments, f"has no effect beside the trained weights of {checkpoint.folder}")
        model = from_json(ModelConfig, checkpoint.config["model"])
        default = replace(default, checkpoint=str(checkpoint.folder), model=model)
    description = f"{description}\n\n--checkpoint sets the defaults of --model to what it was trained with."
    return tyro.cli(
        kind, default=default, description=description, args=arguments, config=(tyro.conf.AvoidSubcommands,)
    )


def _taken(option: str) -> tuple[str | None, list[str]]:
    """The value of one option, and the other arguments."""
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False)
    parser.add_argument(option, dest="value")
    found, others = parser.parse_known_args()
    return found.value, others


def _refuse(option: str, arguments: list[str], why: str) -> None:
    """Raise ValueError if an option is among the arguments, which may spell it with hyphens or underscores."""
    given = {argument.split("=")[0].replace("_", "-") for argument in arguments}
    if option.replace("_", "-") in given:
        raise ValueError(f"{option.replace('_', '-')}: {why}; leave it out")
