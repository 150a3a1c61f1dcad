"""Prints a Kubernetes JobSet (as JSON, which kubectl reads) that trains an experiment on several hosts:

    python experiments/launch/jobset.py --name cells --hosts 2 --gpus 8 --image REGISTRY/bmjax --claim runs -- \
        experiments/bm7_densenet.py --data.root /runs/cells --run_dir /runs/cells-run | kubectl apply -f -

One process a host, which has all its GPUs. The claim is a volume that all hosts see, mounted at /runs; the run's folder
must be on it. A pod that is evicted gets SIGTERM: all hosts stop at the same step, and the JobSet starts them again,
which go on from there.
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Sequence
from typing import Any

PORT = 8476
_GROUP = "hosts"


def jobset(name: str, hosts: int, gpus: int, image: str, claim: str, words: Sequence[str]) -> dict[str, Any]:
    """The object; `words` are those of `bmjax train`."""
    container = {
        "name": "bmjax",
        "image": image,
        "command": ["bmjax", "train", *words, "--resume"],
        "ports": [{"containerPort": PORT}],
        "env": [
            {"name": "JAX_COORDINATOR_ADDRESS", "value": f"{name}-{_GROUP}-0-0.{name}:{PORT}"},
            {"name": "JAX_NUM_PROCESSES", "value": str(hosts)},
            # The process's number is JOB_COMPLETION_INDEX, which an indexed job sets.
        ],
        "resources": {"limits": {"nvidia.com/gpu": gpus}},
        "volumeMounts": [{"name": "runs", "mountPath": "/runs"}],
    }
    pod = {
        "restartPolicy": "Never",
        "terminationGracePeriodSeconds": 120,
        "containers": [container],
        "volumes": [{"name": "runs", "persistentVolumeClaim": {"claimName": claim}}],
    }
    job = {
        "parallelism": hosts,
        "completions": hosts,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "template": {"spec": pod},
    }
    return {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {
            "failurePolicy": {"maxRestarts": 10},
            "replicatedJobs": [{"name": _GROUP, "replicas": 1, "template": {"spec": job}}],
        },
    }


def main(words: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--name", default="bmjax")
    parser.add_argument("--hosts", type=int, required=True)
    parser.add_argument("--gpus", type=int, default=8, help="GPUs of a host")
    parser.add_argument("--image", required=True, help="a container image with bmjax")
    parser.add_argument("--claim", required=True, help="a persistent volume claim that many hosts may write to")
    parser.add_argument("words", nargs="+", help="after --: the experiment, and fields")
    o = parser.parse_args(words)
    print(json.dumps(jobset(o.name, o.hosts, o.gpus, o.image, o.claim, o.words), indent=2))


if __name__ == "__main__":
    main()
