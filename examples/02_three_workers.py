"""A prompt whose KV cache is larger than any worker's KV memory, spread over three workers."""

from pydoc_data.topics import topics

from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams

if __name__ == "__main__":
    with (
        LocalCluster(n_workers=3, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
        Engine(client, model="smollm2-135m", kv_memory="16 MiB") as engine,  # room for 704 tokens on each
    ):
        question = topics["exceptions"] + topics["with"] + "\n\nWhat is this text about?"
        completion = engine.submit([{"role": "user", "content": question}], SamplingParams(max_new_tokens=40)).result()
        print(completion.text)
        print(f"{completion.prompt_tokens} tokens, of which")
        for span in completion.placement:
            print(f"  {span.worker} held {span.start} to {span.stop}")
