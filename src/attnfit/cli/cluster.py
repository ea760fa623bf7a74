"""The workers that a command runs on."""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from attnfit.cli.errors import InputError


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Connect to a scheduler, or start workers here; problems find the client by themselves."""
    try:
        from distributed import Client, LocalCluster
    except ImportError:
        raise InputError("--dask needs Dask; install it with: pip install 'attnfit[dask]'") from None
    if address == "local":
        # What goes wrong on a worker comes back as an error, and is told once.
        quiet: dict[str, Any] = {"silence_logs": logging.CRITICAL}
        with (
            LocalCluster(threads_per_worker=1, dashboard_address=":0", **quiet) as cluster,
            Client(cluster) as client,
        ):
            yield client
        return
    try:
        client = Client(address, timeout="10s")
    except (OSError, ValueError) as error:
        raise InputError(
            f"There is no Dask scheduler at {address} ({error}); start one with: dask scheduler, or use "
            "--dask local"
        ) from None
    with client:
        yield client
