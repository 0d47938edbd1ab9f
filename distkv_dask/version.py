"""The package's version, which client, scheduler and workers compare when an engine opens."""

VERSION = "0.1.0"
