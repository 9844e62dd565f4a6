"""The commands of infra/README.md and the manifest for KubeRay, as those read them whom they are for."""

from __future__ import annotations

import json
import os
import re
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator
from importlib.metadata import version
from pathlib import Path
from typing import Any
from urllib.parse import urlsplit

import jsonschema
import pytest
import tyro
import yaml
from ray.dashboard.modules.job.cli import submit

from instseg.config import AblateConfig, EvaluateConfig, PrepareConfig, TrainConfig

INFRA = Path(__file__).resolve().parents[2] / "infra"
MANIFEST: dict[str, Any] = yaml.safe_load((INFRA / "kuberay" / "rayjob.yaml").read_text())
SCHEMA = jsonschema.Draft202012Validator(yaml.safe_load(Path(__file__).with_name("rayjob-schema.yaml").read_text()))
CONFIGS = {"prepare": PrepareConfig, "train": TrainConfig, "evaluate": EvaluateConfig, "ablate": AblateConfig}
ROOTS = ("devkit", "detections", "logits", "data", "out", "checkpoint")
Shell = Callable[[str], list[list[str]]]


@pytest.fixture
def shell(tmp_path: Path) -> Shell:
    """Runs a script in a shell in which `ray` and `python` do nothing; the arguments of each such call."""
    log = tmp_path / "calls"
    for name in ("ray", "python"):
        stub = tmp_path / name
        stub.write_text(
            f"#!{sys.executable}\nimport json, sys\nprint(json.dumps(sys.argv[1:]), file=open({str(log)!r}, 'a'))\n"
        )
        stub.chmod(0o755)

    def run(script: str) -> list[list[str]]:
        log.write_text("")
        environment = os.environ | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        subprocess.run(["bash", "-euc", script], cwd=INFRA.parent, env=environment, check=True)
        return [json.loads(line) for line in log.read_text().splitlines()]

    return run


def check_workflows(commands: list[list[str]]) -> None:
    """All four workflows in order, each with options that it has, on URIs, what the one wrote the next one reads."""
    assert [Path(script).stem for script, *_ in commands] == ["prepare", "prepare", "train", "evaluate", "ablate"]
    written: list[str] = []
    for script, *arguments in commands:
        config = tyro.cli(CONFIGS[Path(script).stem], args=arguments)
        roots = {name: getattr(config, name) for name in ROOTS if getattr(config, name, None) is not None}
        assert all(urlsplit(root).scheme == "s3" and urlsplit(root).netloc for root in roots.values()), roots
        assert {roots[name] for name in ("data", "checkpoint") if name in roots} <= set(written)
        written.append(roots["out"])
    assert len(set(written)) == len(written)


def submitted(arguments: list[str]) -> dict[str, Any]:
    """What `ray job submit` makes of its arguments."""
    assert arguments[:2] == ["job", "submit"]
    return submit.make_context("submit", arguments[2:]).params


def test_the_four_commands_of_the_readme(shell: Shell) -> None:
    readme = (INFRA / "README.md").read_text()
    (script,) = [block for block in re.findall(r"```sh\n(.*?)```", readme, flags=re.DOTALL) if "submit()" in block]
    script = re.sub(r"^export PATH=\S+ ", "export ", script, flags=re.MULTILINE)  # where the real ray would be found
    jobs = [submitted(arguments) for arguments in shell(script)]
    assert {job["entrypoint"][0] for job in jobs} == {"python"}
    check_workflows([list(job["entrypoint"][1:]) for job in jobs])
    for job in jobs:
        assert job["working_dir"] == "."
        variables = json.loads(job["runtime_env_json"])["env_vars"]
        assert re.fullmatch(r"[0-9a-f]{40}(-dirty)?", variables["INSTSEG_COMMIT"])
        assert variables["MLFLOW_TRACKING_URI"].startswith("http://")


def test_the_manifest_keeps_to_the_schema() -> None:
    SCHEMA.check_schema(SCHEMA.schema)
    SCHEMA.validate(MANIFEST)


def places(node: Any, at: tuple[str | int, ...] = ()) -> Iterator[tuple[tuple[str | int, ...], str]]:
    """Each object's keys, each with the way to the object; not the keys that are free."""
    if isinstance(node, dict) and at[-1:] not in [("rayStartParams",), ("limits",), ("requests",)]:
        yield from ((at, key) for key in node)
    if isinstance(node, dict | list):
        for key, child in node.items() if isinstance(node, dict) else enumerate(node):
            yield from places(child, (*at, key))


def test_any_mistyped_key_of_the_manifest_is_found() -> None:
    found = list(places(MANIFEST))
    assert len(found) > 60
    for at, key in found:
        mistyped = json.loads(json.dumps(MANIFEST))  # a copy without YAML's aliases: one place at a time
        node = mistyped
        for step in at:
            node = node[step]
        node[key + "x"] = node.pop(key)
        assert not SCHEMA.is_valid(mistyped), (at, key)


@pytest.mark.parametrize(
    ("at", "value"),
    [
        (("submissionMode",), "K8sJob"),
        (("ttlSecondsAfterFinished",), "10m"),
        (("rayClusterSpec", "authOptions", "mode"), "tokens"),
        (("rayClusterSpec", "headGroupSpec", "rayStartParams", "num-cpus"), 0),
        (("rayClusterSpec", "rayVersion"), 2.6),
    ],
)
def test_wrong_values_in_the_manifest_are_found(at: tuple[str, ...], value: object) -> None:
    wrong = json.loads(json.dumps(MANIFEST))
    node = wrong["spec"]
    for step in at[:-1]:
        node = node[step]
    assert node[at[-1]] != value
    node[at[-1]] = value
    assert not SCHEMA.is_valid(wrong)


def test_the_manifest_runs_the_four_commands_on_the_cluster(shell: Shell) -> None:
    """As KubeRay does: the entrypoint is pasted into the submitter's shell; what Ray is given runs in the head's."""
    ((*arguments,),) = shell(f"ray job submit --no-wait -- {MANIFEST['spec']['entrypoint'].strip()} ;")
    check_workflows(shell(shlex.join(submitted(arguments)["entrypoint"])))


def test_the_manifest_fits_the_image() -> None:
    dockerfile = (INFRA / "Dockerfile").read_text()
    assert "WORKDIR /app\n" in dockerfile
    assert "--uid 1000 " in dockerfile
    assert "\nUSER 1000\n" in dockerfile
    spec = MANIFEST["spec"]
    cluster = spec["rayClusterSpec"]
    assert cluster["rayVersion"] == version("ray")
    assert yaml.safe_load(spec["runtimeEnvYAML"])["env_vars"]["INSTSEG_COMMIT"] == "@commit@"
    groups = [cluster["headGroupSpec"], *cluster["workerGroupSpecs"]]
    for template in [spec["submitterPodTemplate"], *(group["template"] for group in groups)]:
        assert template["spec"]["securityContext"]["runAsUser"] == 1000
        (container,) = template["spec"]["containers"]
        assert container["image"].endswith("/instseg:@commit@")


def test_the_jobs_api_of_the_manifest_is_closed() -> None:
    cluster = MANIFEST["spec"]["rayClusterSpec"]
    assert cluster["authOptions"] == {"mode": "token"}
    assert cluster["headGroupSpec"]["serviceType"] == "ClusterIP"
    assert not cluster["headGroupSpec"]["enableIngress"]
