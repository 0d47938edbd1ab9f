"""Many documents on Kubernetes, through the operator of dask-kubernetes (`pip install dask-kubernetes`).

Not run by our tests: needs a Kubernetes cluster with the operator, and an image in which this package is installed.
"""

from dask_kubernetes.operator import KubeCluster
from distributed import Client

from distkv_dask import Engine

if __name__ == "__main__":
    resources = {"requests": {"memory": "32Gi", "cpu": "2"}, "limits": {"memory": "32Gi"}}
    with (
        KubeCluster(name="documents", image="registry.example/distkv", n_workers=8, resources=resources) as cluster,
        Client(cluster) as client,
    ):
        client.wait_for_workers(8)
        with Engine(client, model="Qwen/Qwen3-0.6B", kv_memory="20 GiB") as engine:
            done = engine.process("/shared/reports", question="What is this report about?", out="answers.parquet")
            print(done.rows, "rows,", done.errors, "errors")
