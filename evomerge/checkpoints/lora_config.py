"""The adapter_config.json of a LoRA adapter: rank and scale of each module.

Everything that is more than plain LoRA is refused.
"""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evomerge.checkpoints import safetensors_headers
from evomerge.errors import CheckpointError

_REFUSED = {  # a config entry that is set -> what it is
    "target_parameters": "LoRA on parameters that are no layers",
    "trainable_token_indices": "trained rows of an embedding",
    "layer_replication": "a stack with repeated layers",
    "lora_bias": "a bias inside the adapter",
    "use_qalora": "QALoRA",
    "alora_invocation_tokens": "activated LoRA, which no weights can express",
    "monteclora_config": "MonteCLoRA",
    "arrow_config": "a mixture of adapters",
    "use_bdlora": "block-diagonal LoRA",
    "kasa_config": "KaSA",
}
_LONGEST = 200  # characters of a module's name, and of an expression for it
_MOST_PATTERNS = 5000
_MOST_STEPS = 50 * _LONGEST**3  # of a comparison
_SINGLE = ("LITERAL", "NOT_LITERAL", "ANY", "IN")  # what matches one character
_PLAIN_STARTS = (None, True, False, "gaussian", "eva", "orthogonal")
"""Values of init_lora_weights that leave the base alone; the others change its weights on loading."""


class LoraConfig:
    """A checked adapter_config.json.

    Attributes:
        file: The file.
        saved: Names of the modules that were trained whole (modules_to_save).
        has_magnitudes: Whether each module has a vector of magnitudes besides A and B (DoRA).
    """

    def __init__(self, file: Path) -> None:
        """Reads and checks the file.

        Args:
            file: An adapter_config.json.

        Raises:
            CheckpointError: It cannot be read, or the adapter is more than plain LoRA; names the entry.
        """
        data = safetensors_headers.read_json_object(file, "give the folder of a LoRA adapter, which has one")
        self.file = file
        _check_plain(data, file)
        self.has_magnitudes = bool(data.get("use_dora"))
        self._rank_stabilised = bool(data.get("use_rslora"))
        self._rank = _number(data.get("r", 8), "r", file)
        self._alpha = _number(data.get("lora_alpha", 8), "lora_alpha", file)
        self._ranks = _patterns(data, "rank_pattern", file)
        self._alphas = _patterns(data, "alpha_pattern", file)
        saved = data.get("modules_to_save") or []
        if not isinstance(saved, list) or not all(isinstance(name, str) for name in saved):
            raise CheckpointError(f"{file}: modules_to_save must be a list of names, got {saved!r:.60}")
        self.saved: list[str] = saved

    def scale(self, module: str, rank: int) -> float:
        """Factor of B A in a module: alpha / r, or alpha / sqrt(r) with rank-stabilised scaling.

        Args:
            module: Dotted name of the module.
            rank: Number of rows of its A.

        Returns:
            The factor.

        Raises:
            CheckpointError: The config gives the module another rank.
        """
        if len(module) > _LONGEST and (self._ranks or self._alphas):
            raise CheckpointError(
                f"{self.file}: the name {module:.80} … is longer than {_LONGEST} characters"
            )
        expected = _by_pattern(self._ranks, module, self._rank)
        if expected != rank:
            raise CheckpointError(
                f"{self.file} gives {module} the rank {expected:g}, its tensors have {rank}; "
                "save the adapter again"
            )
        alpha = _by_pattern(self._alphas, module, self._alpha)
        return alpha / (math.sqrt(rank) if self._rank_stabilised else rank)


def _check_plain(data: Mapping[str, Any], file: Path) -> None:
    """Raises CheckpointError for an adapter that is more than LoRA."""
    kind = data.get("peft_type")
    if kind != "LORA":
        raise CheckpointError(
            f"{file}: peft_type is {kind!r:.60}; only LORA can be folded into a base, so merge the adapter "
            "with peft first"
        )
    for key, technique in _REFUSED.items():
        if data.get(key):
            raise CheckpointError(
                f"{file} sets {key} ({technique}), which cannot be folded in as plain LoRA; merge the "
                "adapter with peft first"
            )
    start = data.get("init_lora_weights")
    if not any(start is plain or (isinstance(start, str) and start == plain) for plain in _PLAIN_STARTS):
        raise CheckpointError(
            f"{file}: init_lora_weights is {start!r:.60}, which changes the base's weights as it loads; "
            "merge the adapter with peft first"
        )
    if data.get("bias", "none") not in ("none", "lora_only", "all"):
        raise CheckpointError(
            f"{file}: bias must be none, lora_only or all, got {data['bias']!r:.60}; save the adapter again"
        )


def _number(value: Any, name: str, file: Path) -> float:
    if type(value) not in (int, float) or not 0 < value < 1e9:
        raise CheckpointError(
            f"{file}: {name} must be a positive number, got {value!r:.60}; save the adapter again"
        )
    return float(value)


def _patterns(data: Mapping[str, Any], name: str, file: Path) -> list[tuple[re.Pattern[str], float]]:
    """(expression that ends a module's name, number), in the file's order: the first that fits counts."""
    given = data.get(name) or {}
    if isinstance(given, dict) and len(given) > _MOST_PATTERNS:
        raise CheckpointError(f"{file}: {name} has {len(given):,} keys, at most {_MOST_PATTERNS:,} are read")
    if not isinstance(given, dict):
        raise CheckpointError(
            f"{file}: {name} must be an object, got {type(given).__name__}; save the adapter again"
        )
    try:
        for text in given:
            if len(text) > _LONGEST or _steps(text) > _MOST_STEPS:
                raise CheckpointError(
                    f"{file}: {name} has the key {text!r:.80}, an expression that may take for ever to "
                    "compare; name the modules instead"
                )
        return [
            (re.compile(rf"(?:.*\.)?(?:{text})$"), _number(value, name, file))
            for text, value in given.items()
        ]
    except (re.error, RecursionError, OverflowError) as error:
        raise CheckpointError(
            f"{file}: {name} has a key that is no regular expression ({error}); save the adapter again"
        ) from None


def _steps(text: str) -> float:
    """How many steps comparing an expression with a module's name may take at most; infinite if unclear.

    Repeats of single characters take as many steps as the name is long, each for each of the others; what is
    optional or a choice doubles or multiplies them; a repeat of anything else may take for ever.
    """
    steps, stack = float(_LONGEST), [iter(re._parser.parse(text))]  # type: ignore[attr-defined]
    while stack:
        item = next(stack[-1], None)
        if item is None:
            stack.pop()
            continue
        kind, value = str(item[0]), item[1]
        if kind in ("MAX_REPEAT", "MIN_REPEAT"):
            _, most, inner = value
            is_single = len(inner) == 1 and str(inner[0][0]) in _SINGLE
            if most > 1 and not is_single:
                return math.inf
            steps *= min(int(most), _LONGEST) if most > 1 else 2
            stack.append(iter(inner))
        elif kind == "BRANCH":
            steps *= len(value[1])
            stack += [iter(choice) for choice in value[1]]
        elif kind == "SUBPATTERN":
            stack.append(iter(value[-1]))
        elif kind not in _SINGLE and kind != "AT":
            return math.inf  # a look to the side, a reference back
    return steps


def _by_pattern(patterns: list[tuple[re.Pattern[str], float]], module: str, default: float) -> float:
    return next((value for pattern, value in patterns if pattern.match(module)), default)
