"""What is done with an exported folder: commands.sh with a step each, and a Modelfile for Ollama."""

from __future__ import annotations

import re
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from evomerge import _resources
from evomerge._redaction import scrub
from evomerge.evaluation.lm_harness.task_names import names_in
from evomerge.export.licenses import MergedLicense
from evomerge.export.stored_candidate import StoredCandidate

SCRIPT = "commands.sh"
"""Name of the script."""
MODELFILE = "Modelfile"
"""Name of Ollama's file."""
OLLAMA_READS = (
    *("LlamaForCausalLM", "MistralForCausalLM", "MixtralForCausalLM", "GemmaForCausalLM"),
    *("Gemma2ForCausalLM", "Phi3ForCausalLM", "Qwen2ForCausalLM"),
)
"""Architectures whose safetensors Ollama takes as they are; others go through llama.cpp's GGUF."""
_LONGEST_NAME = 60


@dataclass(frozen=True, slots=True)
class Step:
    """A step of commands.sh.

    Attributes:
        name: What it is called by.
        needs: The programs that it takes.
        line: The command, run in the folder.
        about: What it does.
    """

    name: str
    needs: str
    line: str
    about: str


def steps(candidate: StoredCandidate, has_weights: bool, has_recipe: bool) -> tuple[Step, ...]:
    """Lists what can be done with an exported folder.

    Args:
        candidate: What was exported.
        has_weights: Whether the folder holds the merged model; else the step 'merge' makes it.
        has_recipe: Whether it holds a recipe for mergekit.

    Returns:
        The steps, in the order in which they are taken.
    """
    model, name = ("." if has_weights else "model"), model_name(candidate)
    built = "rebuilt" if has_weights else "model"
    found = [Step("merge", "evomerge", f"evomerge merge recipe.json {built}", "make the model, bit for bit")]
    if has_recipe:
        line = re.sub(r"\bOUT\b", "by-mergekit", candidate.mergekit_command)
        found.append(Step("mergekit", "mergekit 0.1.5", line, "make it with mergekit"))
    prompt = f"""pipeline("text-generation", "{model}")("Hello", max_new_tokens=20)"""
    program = f"from transformers import pipeline; print({prompt}[0]['generated_text'])"
    found.append(Step("transformers", "transformers", f"python -c {shlex.quote(program)}", "continue a text"))
    score = score_command(candidate, f'"$PWD"/{model}' if model != "." else '"$PWD"')
    if score is not None:
        found.append(Step("score", "lm-eval", score, "score it on the search's tasks, all of their items"))
    ollama = f"ollama create {name} -f {MODELFILE} && ollama run {name}"
    found += [
        Step("vllm", "vllm", f'vllm serve "$PWD/{model}" --served-model-name {name}', "serve it with vLLM"),
        Step("ollama", "ollama", ollama, "serve it with Ollama"),
        Step(
            "gguf",
            "llama.cpp",
            f'python "${{LLAMA_CPP:?folder of llama.cpp}}/convert_hf_to_gguf.py" {model} '
            f"--outfile {name}.gguf",
            "convert it to a GGUF file",
        ),
        Step(
            "upload",
            "huggingface_hub",
            'hf upload "${2:?USER/NAME on the Hub}" . .',
            f"upload this folder{'' if has_weights else ', the model in model/ too'}",
        ),
    ]
    return tuple(found)


def script(steps: Sequence[Step]) -> str:
    """Writes commands.sh.

    Args:
        steps: What it offers.

    Returns:
        The text of the file.
    """
    width = max(len(step.name) for step in steps)
    about = [f"#   {step.name:{width}}  {step.about} (needs {step.needs})" for step in steps]
    cases = [line for step in steps for line in (f"{step.name})", f"    {step.line}", "    ;;")]
    lines = [
        "#!/usr/bin/env bash",
        "# `bash commands.sh STEP` takes a step in this folder; its line can be copied, too:",
        *about,
        "set -euo pipefail",
        'cd "$(dirname "$0")"',
        'case "${1:-}" in',
        *cases,
        "*)",
        f'    echo "usage: bash {SCRIPT} {"|".join(step.name for step in steps)}" >&2',
        "    exit 2",
        "    ;;",
        "esac",
    ]
    return scrub("\n".join(lines) + "\n")


def modelfile(candidate: StoredCandidate, license: MergedLicense, has_weights: bool) -> str:
    """Writes Ollama's Modelfile; the prompt's template is found by Ollama in the tokenizer's files.

    Args:
        candidate: What was exported.
        license: Of the merge.
        has_weights: Whether the model lies beside the file, or in `model`.

    Returns:
        The text of the file.
    """
    name = model_name(candidate)
    architectures = candidate.parents[candidate.recipe.root_base].config.get("architectures") or ["unknown"]
    kind = str(architectures[0])
    lines = [f"# ollama create {name} -f {MODELFILE}"]
    if kind not in OLLAMA_READS:
        plain = re.sub(r"[^\w.-]", "_", kind)[:80]
        lines.append(
            f"# Ollama may not read the safetensors of {plain}: `bash {SCRIPT} gguf`, then FROM ./{name}.gguf"
        )
    terms = " ".join(scrub(license.rule).replace('"""', "'").split())
    return "\n".join([*lines, f"FROM {'.' if has_weights else './model'}", f'LICENSE """{terms}"""']) + "\n"


def score_command(candidate: StoredCandidate, model: str) -> str | None:
    """The command of lm-eval that scores a model on a search's tasks.

    Args:
        candidate: Of the study with the tasks.
        model: The model's folder, as a shell reads it.

    Returns:
        The command; None where the tasks are Python functions, or of more folders than lm-eval takes.
    """
    settings = candidate.settings
    listed = settings.get("tasks") or ()
    tasks = {str(task["task"]) for task in listed if isinstance(task, dict) and "python" not in task}
    shipped = _resources.evaluators()
    stored = candidate.study.facts.files.get("include") or (settings.get("evaluation") or {}).get("include")
    needed = [folder for folder in (shipped, *map(Path, stored or ())) if tasks & names_in([folder])]
    if not tasks or len(needed) > 1:  # lm_eval takes one folder of tasks
        return None
    words = shlex.join(["--tasks", ",".join(sorted(tasks)), *(f"--include_path={f}" for f in needed)])
    command = "lm_eval --model hf --model_args"
    if needed != [shipped]:
        return f"{command} pretrained={model} {words}"
    # the shipped tasks name their data from the folder that they lie in
    place = shlex.quote(str(shipped.parent))
    return f'(model={model}; cd {place} && {command} pretrained="$model" {words})'


def model_name(candidate: StoredCandidate) -> str:
    """A name that servers and shells take as it is.

    Args:
        candidate: The candidate.

    Returns:
        The study's name and the candidate's number, in lower case.
    """
    plain = re.sub(r"[^a-z0-9._-]+", "-", candidate.study.name.lower()).strip("-._")[:_LONGEST_NAME]
    return f"{plain or 'merge'}-{candidate.trial.id}"
