"""The page in a real browser on a running cluster: each panel shows the engine's figures."""

from __future__ import annotations

import asyncio
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict
from typing import Any

import pytest
from distributed import Client, Scheduler, Worker
from selenium import webdriver
from selenium.webdriver.chrome.service import Service

from distkv_dask import Engine, SamplingParams
from distkv_dask.scheduler.dashboard.look import TEXT
from distkv_dask.scheduler.dashboard.page import PANELS
from distkv_dask.scheduler.ledger.placements import blocks_of
from tests._cluster import engine_test
from tests._models import model_dir, prompt_ids

CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
DRIVER = shutil.which("chromedriver")
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(
        CHROMIUM is None or DRIVER is None,
        reason="no Chromium with its driver: apt-get install chromium chromium-driver",
    ),
]
DASHBOARD = {"scheduler_kwargs": {"dashboard": True, "dashboard_address": "127.0.0.1:0"}}
READ = """
const found = Bokeh.documents[0].get_model_by_name(arguments[0]).data;
const plain = found instanceof Map ? Object.fromEntries(found) : found;
return Object.fromEntries(Object.entries(plain).map(([name, column]) => [name, Array.from(column)]));
"""

DRAWN = """
const cells = [];
const walk = (root) => root.querySelectorAll("*").forEach((one) => {
  if (one.classList.contains("slick-cell")) cells.push(one.textContent);
  if (one.shadowRoot) walk(one.shadowRoot);
});
walk(document);
return cells;
"""


@pytest.fixture
def browser() -> Iterator[webdriver.Chrome]:
    options = webdriver.ChromeOptions()
    options.binary_location = str(CHROMIUM)
    for argument in (
        "--headless=new",
        "--no-sandbox",
        "--disable-gpu",
        "--disable-dev-shm-usage",
        "--window-size=1400,1400",
    ):
        options.add_argument(argument)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    made = webdriver.Chrome(options=options, service=Service(DRIVER))
    made.set_page_load_timeout(60)
    made.set_script_timeout(30)
    yield made
    made.quit()


def complaints(browser: webdriver.Chrome) -> list[str]:
    """Errors in the browser's console."""
    return [line["message"] for line in browser.get_log("browser") if line["level"] in ("SEVERE", "WARNING")]


async def until(look: Callable[[], Any], seconds: float = 60.0) -> Any:
    """Look repeatedly, in a thread, until the page shows something."""
    deadline = time.monotonic() + seconds
    while True:
        try:
            if seen := await asyncio.to_thread(look):
                return seen
        except Exception:  # the page is being loaded
            if time.monotonic() > deadline:
                raise
        assert time.monotonic() < deadline, "the page does not show it"
        await asyncio.sleep(0.2)


def test_every_panel_shows_what_the_engine_says_and_the_page_says_when_it_is_closed(browser: webdriver.Chrome) -> None:
    def data(panel: str) -> dict[str, list[Any]]:
        return browser.execute_script(READ, f"distkv-{panel}")

    @engine_test(3, timeout=240, **DASHBOARD)
    async def run(client: Client, scheduler: Scheduler, *workers: Worker) -> None:
        address = f"http://127.0.0.1:{scheduler.http_server.port}"
        options = {"dtype": "float32", "kv_memory": "4 MiB", "block_tokens": 8, "window_steps": 8}
        async with Engine(client, str(model_dir("llama-gqa")), **options) as engine:
            short = [engine.submit(prompt_ids(40, seed), SamplingParams(max_new_tokens=4)) for seed in range(3)]
            await asyncio.gather(*short)
            long = engine.submit(prompt_ids(300), SamplingParams(max_new_tokens=80, ignore_eos=True))
            while not (placed := (await engine.status()).sequences) or not next(iter(placed.values())).placement:
                await asyncio.sleep(0.01)
            await asyncio.to_thread(browser.get, f"{address}/distkv")
            await until(lambda: data("memory")["label"])
            await long
            document = await engine.ingest(prompt_ids(88, 5))
            keep = engine.submit(prompt_ids(200, 6), SamplingParams(max_new_tokens=3600, ignore_eos=True))
            await until(lambda: data("sequences")["state"] == ["document", "decode"] and data("throughput")["ago"])
            for panel in ("memory", "sequences", "throughput", "requests", "step", "latencies"):
                assert all(await asyncio.to_thread(lambda panel=panel: list(data(panel).values()))), panel
            seen = await asyncio.to_thread(lambda: data("sequences")["generated"][1])
            await until(
                lambda: (row := data("sequences")["generated"][1]) != seen and row in browser.execute_script(DRAWN)
            )
            status = await engine.status()
            bars = await asyncio.to_thread(data, "memory")
            assert sum(bars["documents"]) == blocks_of(document.tokens, 8)
            for at, label in enumerate(bars["label"]):
                facts = status.workers[scheduler.workers[workers[int(label)].address].address]
                blocks = asdict(facts.blocks)
                assert sum(blocks.values()) == facts.capacity_blocks
                assert {part: bars[part][at] for part in blocks} == blocks
            debts = await asyncio.to_thread(data, "debts")
            assert sum(debts["blocks"]) == sum(debt.blocks for debt in status.debts) > 0
            keep.cancel()
        headline = "return Bokeh.documents[0].get_model_by_name('distkv-headline').text"
        await until(lambda: "No engine is open" in browser.execute_script(headline))
        assert not await asyncio.to_thread(complaints, browser)
        for panel in PANELS:
            await asyncio.to_thread(browser.get, f"{address}/individual-distkv-{panel.name}")
            await until(lambda panel=panel: data(panel.name) is not None)
        assert not await asyncio.to_thread(complaints, browser)

    run()


@pytest.mark.parametrize("ground", [0, 255])
def test_text_is_readable_on_light_and_dark(ground: int) -> None:
    def luminance(*channels: int) -> float:
        linear = [c / 255 / 12.92 if c <= 10 else ((c / 255 + 0.055) / 1.055) ** 2.4 for c in channels]
        return 0.2126 * linear[0] + 0.7152 * linear[1] + 0.0722 * linear[2]

    text = luminance(*(int(TEXT[at : at + 2], 16) for at in (1, 3, 5)))
    high, low = sorted((text, luminance(ground, ground, ground)), reverse=True)
    assert (high + 0.05) / (low + 0.05) >= 4.5  # WCAG 2.1, AA
