"""Many documents on the GPUs of one machine, through dask-cuda (`pip install 'distkv-dask[gpu,ucx]'`).

Not run by our tests: needs NVIDIA GPUs. The engine has not run on a real GPU yet.
"""

from dask_cuda import LocalCUDACluster
from distributed import Client

from distkv_dask import Engine

if __name__ == "__main__":
    with (
        LocalCUDACluster(protocol="ucx") as cluster,
        Client(cluster) as client,
        Engine(client, model="Qwen/Qwen3-0.6B", kv_memory="40 GiB") as engine,
    ):
        done = engine.process("reports", question="What is this report about?", out="answers.parquet")
        print(done.rows, "rows,", done.errors, "errors")
