"""Verifications of a model's optimizations, kept for this process and in the user's cache folder.

Probing a real model at the length of few-shot prompts takes longer than scoring it. What is found depends on
the architecture, the type of numbers, the device, the versions of the libraries and the length of requests,
not on a candidate, so that it is measured once on a machine: other workers, and the same study resumed, read
it. A study stores what it began with, and goes on with that. Whatever goes wrong with files makes a start
slower, never wrong.
"""

from __future__ import annotations

import contextlib
import fcntl
import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import nn

from evomerge import __version__, _cache_folder
from evomerge.evaluation.inference.requests import Verification
from evomerge.evaluation.inference.selected_logits import device_of, dtype_of

log = logging.getLogger(__name__)
_FORMAT = 1  # raised when what a probe measures changes
_STEPS = 8  # buckets of lengths between a power of two and the next
_SHORTEST = 64  # tokens of the first bucket
_LARGEST_FILE = 1 << 20  # bytes
_SLOW = 1e11  # operations of a forward on a CPU above which a line says that a probe begins
_NOT_MEASURED = ("OutOfMemoryError", "KeyboardInterrupt")  # reasons that are the moment's
Verifications = dict[str, Verification]
_known: dict[str, Verifications] = {}


def span_bucket(span: int) -> int:
    """Rounds the length of the longest request up, so that neighbouring lengths have one verification.

    Args:
        span: Tokens, at least 1.

    Returns:
        The next of 64, 72, 80, ..., 128, 144, 160, ..., 256, 288, ..., at most an eighth above.
    """
    if span <= _SHORTEST:
        return _SHORTEST
    step = 1 << max(0, (span - 1).bit_length() - 1 - (_STEPS - 1).bit_length())
    return -(-span // step) * step


def verified(
    kind: str,
    model: nn.Module,
    span: int,
    settings: Mapping[str, Any],
    probe: Callable[[], Verifications],
) -> Verifications:
    """Verifies optimizations of a model, unless this process, its study or this machine has done so.

    Args:
        kind: What is verified, such as 'decoders'.
        model: The live model.
        span: Tokens of the longest request, a bucket.
        settings: What else the probe depends on.
        probe: Measures.

    Returns:
        Optimization -> verification.
    """
    key = f"{kind} {_digest(kind, model, span, settings)}"
    if key in _known:
        return dict(_known[key])
    with _turn(key) as file:
        found = None if file is None else _read(file, key)
        if found is None:
            if _is_slow(model, span):
                log.warning(
                    f"verifying {kind} of this model at {span} tokens, once on this machine: "
                    "a forward takes long on a CPU"
                )
            found = probe()
            if not _is_of_the_moment(found):
                _known[key] = found
                if file is not None:
                    _write(file, key, found)
        else:
            log.info("%s: verified before, see %s", kind, file)
            _known[key] = found
    return dict(found)


def known() -> dict[str, dict[str, list[Any]]]:
    """What the study of this process has verified or read since it began, as it stores it.

    Returns:
        Key -> optimization -> [allowed, reason].
    """
    return {key: _plain(found) for key, found in _known.items()}


def begin(stored: Mapping[str, Any]) -> None:
    """Begins with a study: what another one in this process has found or stored is forgotten, files stay.

    Args:
        stored: Result of `known`, taken over for this process alone, as a study may be a stranger's; empty
            for a new study. What is of another form is left out.
    """
    _known.clear()
    for key, plain in stored.items():
        found = _verifications(plain)
        if found is not None:
            _known[key] = found


def _digest(kind: str, model: nn.Module, span: int, settings: Mapping[str, Any]) -> str:
    """What a verification depends on, without a model's weights and its place."""
    config: Any = getattr(model, "config", None)
    described = config.to_dict() if hasattr(config, "to_dict") else {}
    for name in ("_name_or_path", "name_or_path", "transformers_version"):
        described.pop(name, None)
    modules = [f"{name} {type(m).__module__}.{type(m).__qualname__}" for name, m in model.named_modules()]
    shapes = [(name, tuple(parameter.shape)) for name, parameter in model.named_parameters()]
    parts = {
        "format": _FORMAT,
        "kind": kind,
        "span": span,
        "settings": dict(settings),
        "attention": getattr(config, "_attn_implementation", None),
        "config": described,
        "modules": modules,
        "shapes": shapes,
        "dtype": str(dtype_of(model)),
        "device": _device(device_of(model)),
        "versions": {"evomerge": __version__, "torch": torch.__version__, "hf": version("transformers")},
    }
    text = json.dumps(parts, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()[:40]


def _device(device: torch.device) -> list[Any]:
    if device.type == "cuda":
        return [torch.cuda.get_device_name(device), torch.cuda.get_device_capability(device)]
    return [device.type, torch.backends.cpu.get_cpu_capability()]


def _is_slow(model: nn.Module, span: int) -> bool:
    """Whether a probe on a CPU takes long enough that a user should know what happens."""
    parameters = sum(parameter.numel() for parameter in model.parameters())
    return device_of(model).type == "cpu" and 2.0 * parameters * span > _SLOW


def _is_of_the_moment(found: Verifications) -> bool:
    """Whether another model of the kind might be verified better: weights were broken, or memory short."""
    is_short = any(one.reason.startswith(_NOT_MEASURED) or "nan" in one.reason for one in found.values())
    return is_short or not any(one.allowed for name, one in found.items() if name not in ("plain", "whole"))


# ---- files -------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def _turn(key: str) -> Iterator[Path | None]:
    """Waits while another process verifies the same; the file of the result, None without a folder."""
    file = _file(key)
    if file is None:
        yield None
        return
    try:
        lock = file.with_suffix(".lock").open("a")
    except OSError as error:
        log.debug("no lock beside %s: %s", file, error)
        yield None
        return
    with lock:
        with contextlib.suppress(OSError):  # a file system without locks: both verify
            fcntl.flock(lock, fcntl.LOCK_EX)
        yield file


def _file(key: str) -> Path | None:
    folder = _cache_folder.subfolder("verifications")
    return None if folder is None else folder / f"{hashlib.sha256(key.encode()).hexdigest()[:40]}.json"


def _read(file: Path, key: str) -> Verifications | None:
    data = _cache_folder.read_json(file, _LARGEST_FILE)
    return _verifications(data.get("found")) if isinstance(data, dict) and data.get("key") == key else None


def _write(file: Path, key: str, found: Verifications) -> None:
    _cache_folder.write_json(file, {"key": key, "found": _plain(found)})


def _plain(found: Verifications) -> dict[str, list[Any]]:
    return {name: [one.allowed, one.reason] for name, one in found.items()}


def _verifications(plain: Any) -> Verifications | None:
    """What `_plain` made; None for anything else."""
    if not isinstance(plain, dict) or not plain:
        return None
    found: Verifications = {}
    for name, pair in plain.items():
        if not (isinstance(pair, list) and len(pair) == 2 and isinstance(pair[0], bool)):
            return None
        found[name] = Verification(pair[0], str(pair[1]))
    return found
