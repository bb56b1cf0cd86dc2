"""The git patches of ``patches/``, and the record of what the hooks stand on.

    python -m tools.upstream make      # write patches/core_v<version>, from the installed wheel's sources
    python -m tools.upstream check     # are they what would be written, and do they apply?
    python -m tools.upstream seams     # what has changed of what is hooked; --write records it
    python -m tools.upstream tree DIR  # the patched sources, in a new folder under git

Another version: ``--sources DIR``, the folder that has its ``megatron`` (an unpacked wheel or a checkout).
"""

from __future__ import annotations

import argparse
import json
import re
import sys
import tempfile
from importlib.util import find_spec
from pathlib import Path

from tools.upstream.build import apply, build
from tools.upstream.edits import EditError
from tools.upstream.git import copy_sources
from tools.upstream.proposals import PROPOSALS
from tools.upstream.seams import differences, fingerprints, hooked
from tools.upstream.series import RELEASES

ROOT = Path(__file__).parents[2]
SEAMS = "seams.json"
PROPOSED_FOR = "0.19.2"


def installed() -> Path:
    """The folder that has ``megatron`` in this environment."""
    spec = find_spec("megatron.core")
    if spec is None or spec.origin is None:
        sys.exit("megatron-core is not installed: give --sources.")
    return Path(spec.origin).parents[2]


def version_of(sources: Path) -> str:
    """The version of Megatron-Core in ``sources``."""
    text = (sources / "megatron" / "core" / "package_info.py").read_text()
    return ".".join(re.findall(r"^(?:MAJOR|MINOR|PATCH) = (\d+)", text, re.MULTILINE))


def folder_of(version: str) -> Path:
    """Where the patches of a version are."""
    return ROOT / "patches" / f"core_v{version}"


def all_patches(sources: Path, version: str) -> dict[str, bytes]:
    """The patches of a version, by their paths in its folder: its series, and proposals, each for the release."""
    patches = build(sources, RELEASES[version])
    for number, change in enumerate(PROPOSALS if version == PROPOSED_FOR else (), 1):
        [(name, content)] = build(sources, (change,)).items()
        patches[f"proposals/{number:04d}{name[4:]}"] = content
    return patches


def make(sources: Path, version: str) -> None:
    """Write the patches."""
    patches, folder = all_patches(sources, version), folder_of(version)
    for old in folder.rglob("*.patch"):
        old.unlink()
    for name, content in patches.items():
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_bytes(content)
    print(f"{len(patches)} patches in {folder.relative_to(ROOT)}")


def check(sources: Path, version: str) -> None:
    """Compare the patches with what would be written, and apply them."""
    made, folder = all_patches(sources, version), folder_of(version)
    stored = {path.relative_to(folder).as_posix(): path.read_bytes() for path in sorted(folder.rglob("*.patch"))}
    wrong = sorted(name for name in stored.keys() | made.keys() if stored.get(name) != made.get(name))
    if wrong:
        sys.exit(f"not what the tool makes: {', '.join(wrong)}. Run: python -m tools.upstream make")
    with tempfile.TemporaryDirectory(prefix="upstream-") as temporary:
        patched(sources, folder, Path(temporary) / "tree")
    print(f"{len(stored)} patches are up to date and apply")


def patched(sources: Path, folder: Path, tree: Path) -> None:
    """Copy ``sources`` to ``tree``, under git, and apply the patches of ``folder``."""
    tree.mkdir(parents=True)
    copy_sources(sources, tree)
    apply(sorted(folder.glob("*.patch")), tree)


def seams(sources: Path, version: str, write: bool) -> None:
    """Print what has changed since it was recorded; with ``write`` record it."""
    found = fingerprints(sources, hooked())
    if write:
        file = folder_of(version) / SEAMS
        file.parent.mkdir(parents=True, exist_ok=True)
        file.write_text(json.dumps(found, indent=1, sort_keys=True) + "\n")
        print(f"{len(found)} functions recorded in {file.relative_to(ROOT)}")
        return
    file = next(reversed(sorted((ROOT / "patches").glob(f"core_v*/{SEAMS}"))))
    lines = differences(json.loads(file.read_text()), found)
    print("\n".join(lines or [f"megatron-core {version}: nothing that is hooked differs from {file.parent.name}"]))
    sys.exit(1 if lines else 0)


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        "python -m tools.upstream", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("command", choices=["make", "check", "seams", "tree"])
    parser.add_argument("folder", nargs="?", type=Path, help="for tree")
    parser.add_argument("--sources", type=Path, help="the folder that has megatron; the installed one if not given")
    parser.add_argument("--write", action="store_true", help="seams: record them")
    args = parser.parse_args()
    sources = args.sources or installed()
    version = version_of(sources)
    if args.command == "seams":
        seams(sources, version, args.write)
        return
    if version not in RELEASES:
        sys.exit(f"megatron-core {version}: patches are for {', '.join(RELEASES)}. See docs/upgrading.md.")
    try:
        if args.command == "make":
            make(sources, version)
        elif args.command == "check":
            check(sources, version)
        elif args.folder is None:
            parser.error("tree: give a new folder")
        else:
            patched(sources, folder_of(version), args.folder)
    except (EditError, RuntimeError, FileNotFoundError) as error:
        sys.exit(str(error))


if __name__ == "__main__":
    main()
