"""Policies by name: where KV goes, what moves, and which request is next.

May import: `ledger` and `costs`.
May not touch: what the ledger has; policies propose, the lifecycle reserves.
"""

from __future__ import annotations

from distkv_dask.scheduler.costs.model import PerformanceModel
from distkv_dask.scheduler.policies.base import Policy
from distkv_dask.scheduler.policies.best import Best
from distkv_dask.scheduler.policies.dgfm import Dgfm
from distkv_dask.scheduler.policies.greedy import Greedy
from distkv_dask.scheduler.policies.local_only import LocalOnly
from distkv_dask.scheduler.policies.overflow import Overflow
from distkv_dask.scheduler.policies.single import Single

POLICIES: dict[str, type[Policy]] = {
    policy.name: policy for policy in (LocalOnly, Single, Overflow, Dgfm, Greedy, Best)
}
"""All policies; ``distkv.policy`` names one of them."""


def policy_named(name: str, model: PerformanceModel) -> Policy:
    """Build a policy on a performance model."""
    return POLICIES[name](model)
