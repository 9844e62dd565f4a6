from __future__ import annotations

import os
import subprocess
import sys

import pytest
from hypothesis import given
from hypothesis import strategies as st

from instseg.jobs.devices import EvaluatorPlan, Node, plan_evaluators, training_device

EIGHT_GPUS = [Node(12, 8)]
MIXED = [Node(4, 1), Node(8, 0)]


@pytest.mark.parametrize(
    ("nodes", "device", "num_actors", "plan"),
    [
        (EIGHT_GPUS, "auto", 12, EvaluatorPlan("gpu", 12, 0.5)),  # 8/12 = 0.667 each: only eight would start
        (EIGHT_GPUS, "auto", 3, EvaluatorPlan("gpu", 3, 1.0)),
        (EIGHT_GPUS, "cpu", 12, EvaluatorPlan("cpu", 12, 0.0)),
        ([Node(6, 2)], "auto", None, EvaluatorPlan("gpu", 6, 0.3333)),
        (MIXED, "auto", None, EvaluatorPlan("gpu", 4, 0.25)),
        (MIXED, "cpu", None, EvaluatorPlan("cpu", 12, 0.0)),
        ([Node(64, 1)], "gpu", None, EvaluatorPlan("gpu", 20, 0.05)),  # no more than images
        ([Node(2, 0)], "auto", None, EvaluatorPlan("cpu", 2, 0.0)),
    ],
)
def test_evaluators_share_whole_gpus(nodes: list[Node], device, num_actors: int | None, plan: EvaluatorPlan) -> None:
    assert plan_evaluators(device, num_actors, 20, nodes) == plan


clusters = st.lists(st.builds(Node, st.integers(0, 24), st.integers(0, 8)), min_size=1, max_size=4)


@given(clusters, st.sampled_from(["auto", "cpu", "gpu"]), st.none() | st.integers(1, 40))
def test_every_planned_actor_finds_a_place(nodes: list[Node], device, num_actors: int | None) -> None:
    try:
        plan = plan_evaluators(device, num_actors, 1000, nodes)
    except ValueError:
        return
    parts = round(plan.gpus_per_actor * 10_000)  # as Ray counts
    places = [min(node.cpus, node.gpus * (10_000 // parts)) if parts else node.cpus for node in nodes]
    assert 0 < plan.num_actors <= sum(places)
    assert (plan.device == "gpu") == (parts > 0)


@pytest.mark.parametrize(
    ("nodes", "device", "num_actors", "message"),
    [
        ([Node(2, 0)], "auto", 3, "num_actors: expected at most 2, .* got 3; the cluster has 2 CPUs and 0 GPUs on 1"),
        (MIXED, "auto", 5, "num_actors: expected at most 4, one for each CPU beside GPUs, or --device cpu, got 5"),
        ([Node(2, 0)], "gpu", None, "device: expected a cluster with GPUs, got 2 CPUs and 0 GPUs on 1 node"),
        ([], "auto", None, "the cluster has 0 CPUs"),
    ],
)
def test_more_actors_than_there_is_room_for(nodes: list[Node], device, num_actors: int | None, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_evaluators(device, num_actors, 20, nodes)


@pytest.mark.parametrize(
    ("nodes", "device", "num_workers", "expected"),
    [
        ([Node(2, 0)], "auto", 2, "cpu"),
        ([Node(16, 1)], "auto", 1, "gpu"),
        ([Node(16, 1)], "auto", 2, "cpu"),
        ([Node(16, 2)], "cpu", 2, "cpu"),
        ([Node(1, 1), Node(1, 1)], "gpu", 2, "gpu"),
        ([Node(4, 1), Node(4, 1)], "auto", 2, "gpu"),
    ],
)
def test_training_takes_a_gpu_for_each_worker_or_none(nodes, device, num_workers: int, expected: str) -> None:
    assert training_device(device, num_workers, 1, nodes) == expected


@pytest.mark.parametrize(
    ("nodes", "device", "num_workers", "cpus_per_worker", "message"),
    [
        ([Node(2, 0)], "auto", 3, 1, "expected at most 2 with 1 CPU each, got 3; the cluster has 2 CPUs and 0 GPUs"),
        ([Node(16, 1)], "gpu", 2, 1, "expected at most 1 with 1 CPU and a GPU each, got 2; .* 16 CPUs and 1 GPU on 1"),
        ([Node(3, 0), Node(3, 0)], "cpu", 3, 2, "expected at most 2 with 2 CPU each, got 3"),
    ],
)
def test_more_workers_than_there_is_room_for(nodes, device, num_workers, cpus_per_worker, message: str) -> None:
    with pytest.raises(ValueError, match=f"num_workers: {message}"):
        training_device(device, num_workers, cpus_per_worker, nodes)


@pytest.mark.ray
def test_all_actors_start_where_they_outnumber_the_gpus() -> None:
    """Three for two GPUs, which are entries in Ray's books. In a process of its own, for a cluster of its own."""
    script = (
        "import ray\n"
        "from instseg.config import ModelConfig\n"
        "from instseg.jobs import evaluators\n"
        "from instseg.jobs.cluster import cluster, cluster_nodes\n"
        "from instseg.jobs.devices import plan_evaluators\n"
        "from instseg.models.network import InstanceNetwork\n"
        "class Silent:\n"
        "    def __init__(self, *arguments): self.device = arguments[-1]\n"
        "    def answer(self): return self.device\n"
        "evaluators._Evaluator = Silent\n"
        "init = ray.init\n"
        "ray.init = lambda **options: init(**options | {'num_cpus': 3, 'num_gpus': 2})\n"
        "with cluster():\n"
        "    plan = plan_evaluators('auto', None, 1000, cluster_nodes())\n"
        "    with evaluators.Evaluators('data', InstanceNetwork(ModelConfig(), 2), plan) as pool:\n"
        "        print(*ray.get([actor.answer.remote() for actor in pool._actors], timeout=150))\n"
    )
    environment = {key: value for key, value in os.environ.items() if key != "RAY_ADDRESS"}
    done = subprocess.run([sys.executable, "-c", script], env=environment, capture_output=True, text=True, timeout=280)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split() == ["gpu"] * 3
