"""``docs/hooks.md``: every function that is replaced at run time, and why it must be, from the reasons in the code."""

from __future__ import annotations

from collections.abc import Iterable

from megatron_muon import cpu, plugin
from megatron_muon._patching import Patch
from megatron_muon.plugin import frameworks, native
from tools.upstream.proposals import PROPOSALS
from tools.upstream.series import RELEASES

__all__ = ["render"]

_HEAD = """\
# The hooks

Made by `python -m tools.docs` from the reasons in the code; a test compares.

`megatron_muon.install()` replaces {functions} functions and attributes of Megatron-Core, {private} of them private, by
{hooks} hooks. Nothing of the released wheel is edited, and `uninstall()` puts everything back. This page says of each
why it must be. A hook is there because Megatron-Core has no public way to say the same: what can be said by a config, a
flag, an attribute of a weight or another hook has none of its own.

The third column names the [patch](../patches/README.md) with which a fork needs no hook there, and the fourth the
[proposal](../patches/core_v0.19.2/proposals/README.md) to upstream that would end it: {ended} of the {functions}.
"""

_FRAMEWORKS = """\
## In frameworks

Hooked where the framework is imported and has a function by that name.
"""

_CPU = """\
## On the CPU

`megatron_muon.cpu.install()`, which the launcher calls where there is no GPU, redirects {places} places of torch and
Megatron-Core. On a GPU none of them is touched.
"""


def render() -> str:
    """The page."""
    patches = plugin.hooks()
    targets = list(dict.fromkeys(patch.target for patch in patches))
    ended = {target for change in PROPOSALS for target in change.fixes}
    private = [target for target in targets if _is_private(target)]
    parts = [
        _HEAD.format(functions=len(targets), private=len(private), hooks=len(patches), ended=len(ended)),
        *_subjects(patches),
        _FRAMEWORKS,
        _table(("hooked", "why"), _by_reason(frameworks.PATCHES.describe())),
        _CPU.format(places=len({target for target, _ in cpu.describe()})),
        _table(("hooked", "why"), _by_reason(cpu.describe())),
    ]
    return "\n".join(parts)


def _is_private(target: str) -> bool:
    """Whether a part of the name says so; ``__init__`` and the like are of public classes."""
    return any(part.startswith("_") and not part.endswith("__") for part in target.partition(":")[2].split("."))


def _subjects(patches: Iterable[Patch]) -> Iterable[str]:
    """A table for each module of Megatron-Core."""
    natives = {
        native.hook_of(name): f"{number:04d}"
        for number, change in enumerate(RELEASES["0.19.2"], 1)
        for name in (*change.points, *change.fixes)
    }
    proposed = {target: f"{number:04d}" for number, change in enumerate(PROPOSALS, 1) for target in change.fixes}
    reasons: dict[str, dict[str, list[str]]] = {}
    for patch in patches:
        reasons.setdefault(patch.module, {}).setdefault(patch.path, []).append(patch.reason)
    for module in sorted(reasons):
        rows = [
            (_code(path), "; ".join(why), natives.get(f"{module}:{path}", ""), proposed.get(f"{module}:{path}", ""))
            for path, why in reasons[module].items()
        ]
        yield f"## `{module}`\n"
        yield _table(("hooked", "why", "patch", "proposal"), rows)


def _by_reason(described: Iterable[tuple[str, str]]) -> list[tuple[str, str]]:
    found: dict[str, list[str]] = {}
    for target, reason in described:
        found.setdefault(reason, []).append(_code(target))
    return [(", ".join(targets), reason) for reason, targets in found.items()]


def _code(name: str) -> str:
    return f"`{name}`"


def _table(head: tuple[str, ...], rows: Iterable[tuple[str, ...]]) -> str:
    lines = [head, ("---",) * len(head), *rows]
    return "".join(f"| {' | '.join(cell.replace('|', chr(92) + '|') for cell in line)} |\n" for line in lines)
