"""``docs/flags.md``: every flag, with its default and the text of ``--help``, by subject."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import Field, fields
from functools import partial
from pathlib import Path
from typing import Any

from megatron_muon.choices import OPTIMIZERS, PARAM_CHOICES, SECOND_MOMENTS
from megatron_muon.config import SECOND_MOMENT, MuonConfig, flag
from megatron_muon.knobs import EVERY_OPTIMIZER
from megatron_muon.refusals.rule import flag_of

FILE = Path(__file__).parents[1] / "docs" / "flags.md"

SUBJECTS: dict[str, tuple[str, str]] = {
    "Who updates a weight, and as which matrices": (
        "[Routing](routing.md) has the tables, the evidence for the defaults, and rules for weights of your own.",
        "param_rule unknown_2d split_qkv qkv glu mla_up mla_down gdn_in_proj mamba_in_proj router lora_a "
        "scalar_optimizer scalar_lr",
    ),
    "How large an update is": (
        "[Sizes](variants.md) of all scale modes in one table; [transfer](variants.md#hyperparameter-transfer) of "
        "hyperparameters from a small model.",
        "momentum nesterov scale_mode extra_scale_factor weight_decay_method scalar_weight_decay_method transfer "
        "nonfinite",
    ),
    "Variants": (
        "[Variants](variants.md) says what each does, and how to write another.",
        "variant sphere_radius sphere_tolerance stiefel_solver stiefel_iterations stiefel_radius ball_radius",
    ),
    "Newton-Schulz": (
        "[The iteration](iteration.md) says which to choose.",
        "coefficient_type num_ns_steps custom_coefficients eps fp32_matmul_prec ns_dtype ns_backend",
    ),
    "Parallelism": (
        "[Parallelism and cost](parallelism-and-cost.md) says what ranks send each other in each mode.",
        "tp_mode blockwise_period blockwise_lr_mult tp_wire_dtype chunk_mb layer_wise_param_layout",
    ),
    "Memory": (
        "[Memory](memory.md) counts bytes a parameter; `python -m megatron_muon plan` counts those of a run.",
        "master momentum_dtype offload",
    ),
    "Checkpoints": (
        "[Checkpoints](checkpoints.md): other layouts, from Adam to Muon and back.",
        "ckpt_changes",
    ),
    "Attention logits": (
        "[MuonClip](muonclip.md). Megatron's own flags `--qk-clip`, `--qk-clip-threshold`, `--qk-clip-alpha` and "
        "`--log-max-attention-logit` are carried out by this package, for any optimizer.",
        "qk_clip_rule qk_clip_norm qk_logits qk_logits_interval qk_log_layers",
    ),
    "Monitoring": (
        "[Monitoring](monitoring.md): what is measured, and what an alarm means.",
        "log_jsonl log_interval log_per_layer log_console alarm check_replicas_interval dry_run",
    ),
}
"""Heading of each subject: where more is said, and its fields of ``MuonConfig``."""

_HEAD = """\
# Flags

Made by `python -m tools.docs` from `megatron_muon/config.py` and `megatron_muon/options.py`; a test compares.

* In Python, a flag without `--` is a field of Megatron's `OptimizerConfig`: `--muon-num-ns-steps 5` is
  `muon_num_ns_steps=5`. In `megatron_muon.MuonConfig` it has no prefix either: `MuonConfig(num_ns_steps=5)`.
* `megatron_muon.install(MuonConfig(nesterov=True))` sets the defaults of flags and of every config that is built
  afterwards; `MuonConfig(...).apply_to(config)` sets all of them on one. Being fields, they survive
  `dataclasses.replace` and `asdict`, copies field by field, subclasses made before or after `install()`, deepcopy,
  pickle and YAML.
* Learning rate, schedule, weight decay and Adam's numbers are Megatron's own flags. So are `--optimizer`,
  `--use-distributed-optimizer` (with Muon: layer-wise, each weight has one owner in the data-parallel group) and
  [`--optimizer-cuda-graph`](parallelism-and-cost.md#cuda-graph-of-the-step---optimizer-cuda-graph).
* A flag that is misspelt, or that another Megatron has, stops the run, and the message names the one that is meant. A
  flag that the run's optimizer does not read [is refused](refusals.md). Megatron's own `--muon-*` flags stop no run of
  Adam, since launch scripts pass them to any optimizer: a line says that they are not read.
* What differs from Megatron-Core's own Muon is in [migrating](migrating.md#from-megatron-cores-own-muon).
"""


def render() -> str:
    """The page.

    Raises:
        ValueError: naming flags that no subject lists.
    """
    listed = " ".join(names for _, names in SUBJECTS.values()).split()
    if missing := _KNOBS.keys() - listed:
        raise ValueError(f"{', '.join(sorted(missing))}: give each a place in SUBJECTS of tools/flags_page.py.")
    parts = [_HEAD]
    for heading, (more, names) in SUBJECTS.items():
        entries = [_entry(_KNOBS[name]) for name in names.split()]
        if heading == "Variants":
            entries += map(_second_moment, SECOND_MOMENT)
        parts += [f"## {heading}\n", f"{more}\n", "".join(entries)]
    return "\n".join(parts)


_KNOBS = {field.name: field for field in fields(MuonConfig)}
_OF_FLAG = {flag(name): knob for name, knob in _KNOBS.items()}


def _entry(knob: Field[Any]) -> str:
    name = flag(knob.name)
    head = f"`{name}`"
    if isinstance(knob.default, bool):
        head += f", `--no-{name[2:]}`"
    head += "".join(f", `{alias}`" for alias in knob.metadata["aliases"])
    readers = knob.metadata["readers"]
    by = ""
    if readers == EVERY_OPTIMIZER:
        by = " Acts with any `--optimizer`."
    elif readers != OPTIMIZERS:
        by = f" Read by {', '.join(f'`{each}`' for each in readers)}."
    return f"* **{head}** ({_default(knob.default)}): {_text(knob.metadata['help'], partial(_takes, knob))}{by}\n"


def _second_moment(name: str) -> str:
    default, text = SECOND_MOMENT[name]
    return f"* **`{flag_of(name)}`** ({_default(default)}): {_text(text, SECOND_MOMENTS.__contains__)}\n"


def _default(value: object) -> str:
    if isinstance(value, bool):
        return "on" if value else "off"
    if isinstance(value, tuple):
        return "none, repeatable"
    return f"`{value:g}`" if isinstance(value, float) else f"`{value}`" if value != "" else "none"


def _takes(knob: Field[Any], word: str) -> bool:
    """Whether a word is a value of a flag, of those that have named values."""
    if knob.name == "param_rule":
        return word in PARAM_CHOICES
    return isinstance(knob.default, str) and knob.name != "log_jsonl" and knob.metadata["check"](word) is None


def _text(text: str, is_value: Callable[[str], bool]) -> str:
    """The help text as Markdown: flags with their values, and a flag's own values where they stand first, are code."""
    seen = set()

    def code(match: re.Match[str]) -> str:
        word = match[0]
        name, _, value = word.partition(" ")
        if name.startswith("--"):
            own = _OF_FLAG.get(name)
            known = value in OPTIMIZERS if name == "--optimizer" else own is not None and _takes(own, value)
            return f"`{word}`" if not value or known or value.isdigit() else f"`{name}` {value}"
        if (
            word in seen
            or text[: match.start()].endswith(("the ", "'s "))
            or not ("=" in word or ":" in word or "(" in word or is_value(word))
        ):
            return word
        seen.add(word)
        return f"`{word}`"

    return re.sub(r"(?<![\w-])--[\w-]+(?: \w+)?|GLOB=\w+|split\(q[^)]*\)|\w+:\w+|\b[a-z]\w*\b", code, text)
