"""Where a search would run, checked before a model is opened: Ray, its cluster, cards, the device."""

from __future__ import annotations

from evomerge.config import Config
from evomerge.errors import SetupError
from evomerge.launch.opening import device_name


def check_place(settings: Config) -> str:
    """Checks that the place that the settings name can be had.

    Args:
        settings: The settings of the search, with flags of where it runs applied.

    Returns:
        A sentence where candidates will be evaluated on the CPU; empty where they will not, or where that is
        the cluster's to say.

    Raises:
        ConfigError: For an address that is none, or an unknown device.
        SetupError: If Ray is not installed, no cluster answers, or there is no card where one is requested.
    """
    address, gpus = settings.cluster.ray, settings.cluster.gpus
    if address is not None:
        _check_cluster(address)
    if address not in (None, "local"):
        return ""
    device = device_name()
    is_requested = bool(gpus) and (address == "local" or (gpus or 0) > 1)
    if is_requested and not _cards():
        raise SetupError(
            f"a worker is to have {gpus:g} of a GPU, and this machine has none; leave --gpus out, or join a "
            "cluster that has some"
        )
    return "no GPU is used: candidates are evaluated on the CPU" if device.startswith("cpu") else ""


def _check_cluster(address: str) -> None:
    """Raises where Ray is not there, or no cluster at the address."""
    try:
        from evomerge.workers.ray_pool import cluster
    except ImportError as error:
        raise SetupError(
            f"--ray needs Ray, which is not installed ({error}); pip install 'evomerge[ray]', "
            "or run with --workers"
        ) from None
    if address != "local":
        cluster.required(address)


def _cards() -> int:
    import torch

    return torch.cuda.device_count()
