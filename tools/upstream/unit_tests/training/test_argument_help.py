"""--help of arguments that are made from the fields of a dataclass."""

import argparse
from dataclasses import dataclass

from megatron.training.argument_utils import ArgumentGroupFactory


@dataclass
class Config:
    """A config."""

    factor: float = 1.1
    """Factor of the buffer's size (1.10 = 10%)."""

    plain: int = 1
    """No sign."""


def test_help_may_have_per_cent_signs():
    parser = argparse.ArgumentParser()
    ArgumentGroupFactory(Config).build_group(parser)
    text = " ".join(parser.format_help().split())
    assert "(1.10 = 10%)." in text and "No sign." in text
