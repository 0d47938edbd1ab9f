"""Certificates of a cluster with TLS, as files, because machines are separate processes."""

from __future__ import annotations

from pathlib import Path

from distributed import Security


class Certificates:
    """One authority, certificate and key for all processes.

    Parameters
    ----------
    folder
        Folder for their files.
    """

    def __init__(self, folder: Path) -> None:
        made = Security.temporary()
        self._ca, self._certificate, self._key = (folder / name for name in ("ca.pem", "certificate.pem", "key.pem"))
        self._ca.write_text(made.tls_ca_file)
        self._certificate.write_text(made.tls_worker_cert)
        self._key.write_text(made.tls_worker_key)

    @property
    def security(self) -> Security:
        """Security settings of the scheduler and its clients."""
        return security(self._ca, self._certificate, self._key)

    @property
    def options(self) -> list[str]:
        """Options of Dask's command-line programs."""
        return ["--tls-ca-file", str(self._ca), "--tls-cert", str(self._certificate), "--tls-key", str(self._key)]

    @property
    def files(self) -> list[str]:
        """Arguments of :func:`security`, for the benchmark's programs."""
        return [str(self._ca), str(self._certificate), str(self._key)]


def security(ca: Path, certificate: Path, key: Path) -> Security:
    """Security settings that use these files in every role."""
    return Security(
        require_encryption=True,
        tls_ca_file=str(ca),
        **{
            f"tls_{role}_{kind}": str(path)
            for role in ("scheduler", "worker", "client")
            for kind, path in (("cert", certificate), ("key", key))
        },
    )
