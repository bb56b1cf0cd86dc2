"""Tied embeddings on pipeline stages that have only multi-token prediction, under layer-wise optimizers."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.launch import FLAGS, SCRIPT, check, launch, records

TIED = [*FLAGS.replace("--untie-embeddings-and-output-weights ", "").split(), "--optimizer", "muon"]
TIED += ["--mtp-num-layers", "1", "--train-iters", "4", "--save-interval", "1"]
SCRIPTS = Path(__file__).parent / "scripts"
OWN_STAGE = ["--pipeline-model-parallel-size", "3", "--pipeline-model-parallel-layout", "Ett|m|L"]
"""Embedding and decoder, multi-token prediction, output layer: three copies of one table."""
OVERLAP = ["--overlap-grad-reduce", "--overlap-param-gather", "--ddp-num-buckets", "3"]
TOLERANCE = {False: 4e-6, True: 2e-3}
"""By whether numbers have 16 bits. 0.0 was measured in float32, 1.2e-4 in bfloat16; losses are about 4.7."""


def losses(script: Path, log: Path, *flags: str, ranks: int, says: str = "") -> dict[int, float]:
    """Of each iteration that this run has trained."""
    output = check(launch(str(script), *TIED, *flags, "--muon-log-jsonl", str(log), ranks=ranks))
    assert says in output
    return {point["iteration"]: point["losses"]["lm loss"] for point in records(log)}


@pytest.mark.parametrize(
    "flags",
    [
        pytest.param(OVERLAP, id="layout"),
        pytest.param(["--no-use-layer-wise-param-layout", *OVERLAP], id="lists", marks=pytest.mark.slow),
        pytest.param(["--bf16"], id="bf16", marks=pytest.mark.slow),
    ],
)
def test_copies_stay_equal(tmp_path: Path, flags: list[str]) -> None:
    """After every step, bit for bit; with the losses of one process. Each resumes what the other has saved."""
    precision = ["--bf16"] if "--bf16" in flags else []
    one, several = str(tmp_path / "one"), str(tmp_path / "several")
    expected = losses(SCRIPT, tmp_path / "one.jsonl", *precision, "--save", one, ranks=1)
    (tmp_path / "one" / "latest_checkpointed_iteration.txt").write_text("1")
    resumed = losses(
        SCRIPTS / "copies_of_embedding.py",
        tmp_path / "several.jsonl",
        *(*OWN_STAGE, *flags, "--use-distributed-optimizer", "--load", one, "--save", several, "--exit-interval", "3"),
        ranks=6,
        says="3 copies of the embedding are equal",
    )
    again = losses(SCRIPT, tmp_path / "again.jsonl", *precision, "--load", several, ranks=1)
    assert [*resumed, *again] == [2, 3, 4]
    assert {**resumed, **again} == pytest.approx(
        {step: expected[step] for step in (2, 3, 4)}, abs=TOLERANCE[bool(precision)]
    )


def test_a_stage_whose_gradient_nobody_adds() -> None:
    """A script that does not say which stages have the embedding: its copy starts from zeros, and stays apart."""
    result = launch(str(SCRIPTS / "pretrain_with_builder.py"), *TIED, *OWN_STAGE, ranks=3)
    assert result.returncode == 2
    assert "embedding.word_embeddings.weight is a copy of the embedding on a rank outside the emb" in result.stderr


def test_an_output_layer_with_a_weight_beside_the_tied_one() -> None:
    result = launch(str(SCRIPT), *TIED, "--pipeline-model-parallel-size", "2")
    assert result.returncode == 2
    assert "--mtp-num-layers on a last stage whose output layer is tied to the embedding: Megatron" in result.stderr
