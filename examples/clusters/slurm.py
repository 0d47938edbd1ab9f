"""Many documents on a Slurm cluster, through dask-jobqueue (`pip install dask-jobqueue`).

Not run by our tests: needs Slurm. dask-jobqueue has a class with the same arguments for each of PBS, LSF, SGE and the
others. Batches were run by hand on its cluster of local processes.
"""

from dask_jobqueue import SLURMCluster
from distributed import Client

from distkv_dask import Engine

if __name__ == "__main__":
    with (
        SLURMCluster(cores=1, processes=1, memory="32 GB", walltime="08:00:00") as cluster,
        Client(cluster) as client,
    ):
        cluster.scale(jobs=16)
        client.wait_for_workers(4)  # the others join the engine when they start
        with Engine(client, model="Qwen/Qwen3-0.6B", kv_memory="20 GiB") as engine:
            done = engine.process("reports", question="What is this report about?", out="answers.parquet")
            print(done.rows, "rows,", done.errors, "errors")
