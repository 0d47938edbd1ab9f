"""One worker with the model, three that only hold KV: a document three times as large as the home's own memory."""

from pydoc_data.topics import topics

from distributed import Client, Nanny, Scheduler, SpecCluster

from distkv_dask import Engine, SamplingParams

if __name__ == "__main__":
    home = {"cls": Nanny, "options": {"nthreads": 1}}
    memory = {"cls": Nanny, "options": {"nthreads": 1, "resources": {"distkv-memory": 1}}}
    scheduler = {"cls": Scheduler, "options": {"dashboard_address": None}}
    with (
        SpecCluster({"home": home, "m1": memory, "m2": memory, "m3": memory}, scheduler=scheduler) as cluster,
        Client(cluster) as client,
        Engine(client, model="smollm2-135m", kv_memory="24 MiB") as engine,
    ):
        prompt = [{"role": "user", "content": topics["typesmapping"] + "\n\nWhat is this text about?"}]
        answer = engine.submit(prompt, SamplingParams(max_new_tokens=40)).result()
        print(answer.text)
        roles = {worker: one["role"] for worker, one in engine.status()["workers"].items()}
        for span in answer.placement:
            print(f"{span.tokens:5} tokens on {span.worker}, {roles[span.worker]}")
