"""The command line of ``python -m megatron_muon plan``: files, arguments, and what it refuses."""

from __future__ import annotations

import json
import shlex
from pathlib import Path
from typing import Any

import pytest

from tests.megatron.planner import GROUPS, MODELS, TINY, Planner


def test_arguments_override_the_file(planner: Planner, tmp_path: Path) -> None:
    arguments = ["--num-layers", "4", "--tensor-model-parallel-size", "4", "--muon-no-split-qkv", "--tokens", "1000"]
    path = tmp_path / "plan.json"
    file = ["--model", str(MODELS / "llama3_8b.args"), "--world-size", "8", "--json", str(path), "--device", "h200"]
    outcome = planner.command([*file, *arguments])
    assert outcome.code == 0, outcome.errors
    document = json.loads(path.read_text())
    layer = 4096 * (2 * 4096 + 2 * 1024 + 3 * 14336) + 2 * 4096
    assert document["total_parameters"] == 4 * layer + 2 * 128256 * 4096 + 4096
    assert (document["layout"]["world"], document["layout"]["tensor"], document["layout"]["data"]) == (8, 4, 2)
    qkv = next(entry for entry in document["classes"] if "linear_qkv" in entry["pattern"])
    assert [block["rows"] for block in qkv["blocks"]] == [6144]
    assert document["step"]["tokens"] == 1000
    device = document["device"]
    assert device["rates"]["memory"] == {
        "value": 4.3e12,
        "kind": "measured",
        "source": "one H200, device-to-device copy, reading and writing, torch 2.11, CUDA 13",
    }
    possible = {mode for mode, its in document["tensor_parallel_modes"].items() if its is not None}
    assert device["left_out"] == []
    assert set(device["milliseconds"]) == set(device["operations"]) == possible
    for mode, parts in device["milliseconds"].items():
        total = parts.pop("total")
        assert total == pytest.approx(sum(parts.values()))
        # the greatest rank's operations at the rate of large products take no longer
        assert total > 1e3 * document["tensor_parallel_modes"][mode]["newton_schulz_flops"]["max"] / 7.88e14
    assert "ms of the busiest rank" in outcome.text and "H200 SXM 141 GB" in outcome.text


def test_unknown_flag_ends_the_command(planner: Planner) -> None:
    outcome = planner.command(["--model", str(MODELS / "llama3_8b.args"), "--hiden-size", "64"])
    assert (outcome.code, outcome.text) == (2, "")
    assert outcome.errors == (
        "megatron_muon plan: error: unrecognized arguments: --hiden-size 64. "
        "Give Megatron's flags as a training run takes them.\n"
    )


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ("", ["--model"]),
        ("--model no/such.args", ["--model no/such.args", "No such file", "text file of Megatron's flags"]),
        ("--model {llama} --hidden-size many", ["--hidden-size", "many"]),
        ("--model {llama} --memory-gb -1", ["--memory-gb", "-1"]),
        ("--model {llama} --device h300", ["--device h300", "a100, h100, h200, b200", "tools.rates"]),
        ("--model {llama} --world-size 6 --tensor-model-parallel-size 4", ["--world-size 6", "multiple of 4"]),
        ("--model {llama} --tensor-model-parallel-size 0", ["--tensor-model-parallel-size 0", "at least 1"]),
        ("--model {llama} --pipeline-model-parallel-size 3 --world-size 6", ["layers", "pipeline"]),
        ("--model {llama} --tensor-model-parallel-size 64", ["num_attention_heads (32)", "tensor_model_parallel_size"]),
        ("--model {llama} --optimizer adam", ["--optimizer adam", "--optimizer muon"]),
        ("--model {llama} --muon-num-ns-steps 0", ["--muon-num-ns-steps 0"]),
        ("--model {llama} --muon-param-rule *.no_such=adam", ["--muon-param-rule '*.no_such=adam'"]),
        ("--model {llama} --use-checkpoint-args", ["--use-checkpoint-args"]),
        ("--model {llama} --num-layers 2 --json no/such/plan.json", ["--json no/such/plan.json", "No such file"]),
        ("--model {own} --num-layers 2", ["--model", "--model-size 3"]),
        ("--optimizer muon --num-layers 2", ["assert", "args.micro_batch_size"]),
        ("{tiny} --global-batch-size 3 --world-size 2", ["global_batch_size (3)"]),
        (
            "{tiny} --tensor-model-parallel-size 4 --muon-tp-mode blockwise",
            ["--muon-tp-mode blockwise", "16 rows on each"],
        ),
        ("{tiny} --activations-gb 1", ["--activations-gb", "--memory-gb"]),
        ("{tiny} --muon-tp-mode gram --muon-ns-dtype fp16 --muon-coefficient-type cans", ["Use --muon-ns-dtype"]),
    ],
)
def test_errors_name_the_flag(planner: Planner, tmp_path: Path, arguments: str, expected: list[str]) -> None:
    own = tmp_path / "own.args"
    own.write_text("# plan: --model-size 3\n")
    line = arguments.format(llama=MODELS / "llama3_8b.args", own=own, tiny=shlex.join([*TINY, *GROUPS]))
    code, _, message = planner.command(shlex.split(line))
    assert code == 2
    assert all(part in message for part in expected), message
    assert "Traceback" not in message
    assert len(message) < 1000, "Megatron's own usage is longer than a screen"


def test_a_file_of_flags(planner: Planner, tmp_path: Path) -> None:
    """Any number of flags a line, comments, quotes, options of the plan; the command line comes last."""
    path = tmp_path / "tiny.args"
    path.write_text(
        "# a tiny model\n# plan: --world-size 4 --tokens 12\n" + " ".join([*TINY, *GROUPS]) + "\n\n--swiglu\n"
    )
    outcome = planner.command(["--model", str(path), "--json", str(tmp_path / "1.json")])
    assert (outcome.code, outcome.errors) == (0, "")
    document = json.loads((tmp_path / "1.json").read_text())
    assert (document["layout"]["world"], document["step"]["tokens"]) == (4, 12)
    again = ["--model", str(path), "--world-size", "2", "--json", str(tmp_path / "2.json"), "--num-layers", "2"]
    outcome = planner.command(again)
    assert (outcome.code, outcome.errors) == (0, "")
    document = json.loads((tmp_path / "2.json").read_text())
    assert (document["layout"]["world"], document["step"]["tokens"]) == (2, 12)
    layer = next(entry for entry in document["classes"] if "linear_fc2" in entry["pattern"])
    assert layer["count"] == 2


def test_the_cheapest_setting_that_fits(planner: Planner, tmp_path: Path) -> None:
    """Exact ones first; flags to add, bytes and errors; if none fits, by how much."""
    path = tmp_path / "fit.json"
    common = ["--model", str(MODELS / "llama3_8b.args"), "--num-layers", "2", "--json", str(path)]

    def fitted(*arguments: str) -> tuple[dict[str, Any], str]:
        outcome = planner.command([*common, *arguments])
        assert (outcome.code, outcome.errors) == (0, "")
        return json.loads(path.read_text()), outcome.text

    document, text = fitted("--memory-gb", "5", "--activations-gb", "1", "--device", "h200")
    found, given = document["fit"], document["fullest_rank"]
    assert found["fits"] and found["memory_bytes"] == 5 * 2**30
    *others, chosen = found["settings"]
    assert all(each["device_bytes"] > found["memory_bytes"] for each in others)
    in_step = sum(each["bytes"] for each in given["bytes"] if "step" in each["kind"])
    assert others[0]["flags"] == [] and others[0]["device_bytes"] == given["device_bytes"] - in_step + 2**30
    flags = ["--layer-wise-param-layout decoupled", "--muon-master remainder", "--grad-reduce-in-bf16"]
    assert [each["flags"] for each in (*others[1:], chosen)] == [flags[:1], flags[:2], flags]
    assert others[2]["error"] == "" and "1.7e-3" in chosen["error"]
    assert others[2]["seconds"] > others[0]["seconds"] > 0
    assert text.endswith(f"Add {' '.join(flags)}\n")
    assert "ms of Muon's step" in text
    # These flags give what was said, and no setting takes more of anything than they do.
    document, text = fitted("--memory-gb", "1", *" ".join(flags).split())
    again, *rest = document["fit"]["settings"]
    most = document["fullest_rank"]["device_bytes"]
    assert (again["flags"], again["device_bytes"]) == ([], most)
    assert "ms of Muon's step" not in text
    bf16, int8 = (["--muon-momentum-dtype bf16"], ["--muon-momentum-dtype int8"])
    places = ["--muon-offload momentum"], ["--muon-offload all"]
    wider = [bf16, *(each for place in places for each in (place, [*bf16, *place]))]
    assert [each["flags"] for each in rest] == [*wider, int8, *([*int8, *place] for place in places)]
    assert [each["host_bytes"] > 0 for each in rest] == ["--muon-offload" in str(each["flags"]) for each in rest]
    assert "State on the host is copied to the GPU and back in every step." in text
    assert not document["fit"]["fits"]
    missing = (min(each["device_bytes"] for each in rest) - 2**30) / 2**30
    assert f"None fits: --muon-momentum-dtype int8 takes least, {missing:.2f} GiB too much" in text
