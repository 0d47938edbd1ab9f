"""Many questions about a document that is read once: several together, in a chat, and after saving and loading it."""

import tempfile
from pydoc_data.topics import topics

from distributed import Client, LocalCluster

from distkv_dask import Engine, SamplingParams

if __name__ == "__main__":
    short = SamplingParams(max_new_tokens=32)
    with (
        LocalCluster(n_workers=2, threads_per_worker=1, dashboard_address=":0") as cluster,
        Client(cluster) as client,
        Engine(client, model="smollm2-135m", kv_memory="48 MiB") as engine,
        tempfile.TemporaryDirectory() as folder,
    ):
        with engine.ingest(topics["with"] + topics["exceptions"], name="reference") as document:
            for answer in document.ask(["What is it about?", "What does a with statement do?"], short):
                print(f"- {answer.text.strip()}\n  ({answer.reused_tokens} of {answer.prompt_tokens} tokens reused)")
            with document.chat() as chat:
                print("-", chat.ask("Name one exception.", short).text.strip())
                print("-", chat.ask("When is it raised?", short).text.strip())
            document.save(folder)
        with engine.load(folder) as document:
            print("-", document.ask("What is it about?", short).text.strip())
