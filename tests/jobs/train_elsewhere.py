"""Train on the node that is not the head until it is lost, as a driver on a cluster would; for the tests."""

from __future__ import annotations

import sys
import threading
import time
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from instseg.config import TrackingConfig, TrainConfig
from instseg.jobs.cluster import cluster, cluster_nodes
from instseg.jobs.train import train

NUM_EPOCHS = 3


class Guest:
    """Takes the head's one CPU, so that workers find room elsewhere."""

    def is_there(self) -> bool:
        """Once it is."""
        return True


def make_room_when_alone(guest: Any) -> None:
    """Let the guest go when there is no other node."""
    while len(cluster_nodes()) > 1:
        time.sleep(0.2)
    ray.kill(guest)


if __name__ == "__main__":
    data, out = sys.argv[1:]
    with cluster():
        head = NodeAffinitySchedulingStrategy(ray.get_runtime_context().get_node_id(), soft=False)
        guest: Any = ray.remote(num_cpus=1)(Guest).options(scheduling_strategy=head).remote()  # pyright: ignore
        assert ray.get(guest.is_there.remote())
        threading.Thread(target=make_room_when_alone, args=(guest,), daemon=True).start()
        tracking = TrackingConfig("sqlite:///elsewhere.db")
        train(TrainConfig(data, out, num_epochs=NUM_EPOCHS, num_workers="1:2", device="cpu", tracking=tracking))
