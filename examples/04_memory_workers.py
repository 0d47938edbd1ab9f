"""One worker with the model, three that only hold KV: a document three times as large as the home's own memory."""

import asyncio
from pydoc_data.topics import topics

from distributed import Client, LocalCluster, Nanny

from distkv_dask import Engine, SamplingParams


async def main() -> None:
    async with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0", asynchronous=True) as cluster:
        memory = [Nanny(cluster.scheduler_address, nthreads=1, resources={"distkv-memory": 1}) for _ in range(3)]
        async with (
            memory[0],
            memory[1],
            memory[2],
            Client(cluster, asynchronous=True) as client,
            Engine(client, model="smollm2-135m", kv_memory="24 MiB") as engine,
        ):
            prompt = [{"role": "user", "content": topics["typesmapping"] + "\n\nWhat is this text about?"}]
            answer = await engine.submit(prompt, SamplingParams(max_new_tokens=40))
            print(answer.text)
            roles = {worker: one.role for worker, one in (await engine.status()).workers.items()}
            for span in answer.placement:
                print(f"{span.tokens:5} tokens on {span.worker}, {roles[span.worker]}")


if __name__ == "__main__":
    asyncio.run(main())
