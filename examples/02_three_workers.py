"""The README's example: a document whose KV cache is larger than any worker's KV memory, and two questions."""

from pydoc_data.topics import topics  # long texts that come with Python

from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams

if __name__ == "__main__":
    questions = ["What is this text about?", "Which methods does it name?"]
    with (
        LocalCluster(n_workers=3, threads_per_worker=1) as cluster,
        Client(cluster) as client,
        Engine(client, model="smollm2-135m", kv_memory="32 MiB") as engine,  # room for 1,408 tokens per worker
        engine.ingest(topics["typesmapping"]) as document,  # 3,328 tokens
    ):
        for answer in document.ask(questions, SamplingParams(max_new_tokens=40)):
            print(answer.text, [span.tokens for span in answer.placement])
