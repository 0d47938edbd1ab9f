"""A model on one worker: the smallest thing that runs."""

from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams

if __name__ == "__main__":
    with (
        LocalCluster(n_workers=1, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
        Engine(client, model="smollm2-135m", kv_memory="64 MiB") as engine,
    ):
        questions = [[{"role": "user", "content": text}] for text in ("What is gravity?", "Name three colours.")]
        for completion in engine.generate(questions, SamplingParams(max_new_tokens=40)):
            print(f"[{completion.finish_reason}] {completion.text}")
