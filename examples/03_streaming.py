"""Text as it is generated, sampled with a seed; then the same from a coroutine."""

import asyncio

from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams

PROMPT = [{"role": "user", "content": "Write two sentences about the sea."}]
SAMPLING = SamplingParams(max_new_tokens=40, temperature=0.7, top_p=0.95, seed=1, stop=("\n\n",))


async def coroutine(address: str) -> None:
    async with Client(address, asynchronous=True) as client, Engine(client, model="smollm2-135m") as engine:
        async for piece in engine.stream(PROMPT, SAMPLING):
            print(piece, end="", flush=True)
    print()


if __name__ == "__main__":
    with LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster:
        with Client(cluster) as client, Engine(client, model="smollm2-135m") as engine:
            for piece in engine.stream(PROMPT, SAMPLING):
                print(piece, end="", flush=True)
            print()
        asyncio.run(coroutine(cluster.scheduler_address))
