"""distkv-dask: long-context language-model inference on Dask with DistAttention and a distributed KV cache.

The open implementation of *Infinite-LLM* (arXiv 2401.02669): one request's KV cache may be larger than any worker's
memory.
"""

from distkv_dask.client.batch.summary import BatchSummary
from distkv_dask.client.documents.chat import Chat
from distkv_dask.client.documents.document import Document
from distkv_dask.client.engine import Engine
from distkv_dask.completion import Completion, Timings
from distkv_dask.errors import (
    CapacityError,
    ChannelError,
    ChannelTimeoutError,
    ClusterError,
    ConfigError,
    DistKVError,
    EngineClosedError,
    GangAbortedError,
    InvalidRequestError,
    ModelError,
    OutputError,
    PlanError,
    ResultTimeoutError,
    SavedDocumentError,
    SourceError,
    TooManyErrorsError,
    UnsupportedModelError,
    WorkerLostError,
)
from distkv_dask.logprobs import TokenLogprob, perplexity
from distkv_dask.messages.status import EngineStatus, SequenceStatus, WorkerStatus
from distkv_dask.placement import Span
from distkv_dask.quotes import Quote
from distkv_dask.sampling import SamplingParams
from distkv_dask.version import VERSION as __version__

__all__ = [
    "BatchSummary",
    "CapacityError",
    "ChannelError",
    "ChannelTimeoutError",
    "Chat",
    "ClusterError",
    "Completion",
    "ConfigError",
    "DistKVError",
    "Document",
    "Engine",
    "EngineClosedError",
    "EngineStatus",
    "GangAbortedError",
    "InvalidRequestError",
    "ModelError",
    "OutputError",
    "PlanError",
    "Quote",
    "ResultTimeoutError",
    "SamplingParams",
    "SavedDocumentError",
    "SequenceStatus",
    "SourceError",
    "Span",
    "Timings",
    "TokenLogprob",
    "TooManyErrorsError",
    "UnsupportedModelError",
    "WorkerLostError",
    "WorkerStatus",
    "__version__",
    "perplexity",
]
