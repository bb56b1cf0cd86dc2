"""The command line: ``python -m megatron_muon``."""

from megatron_muon.cli import main

if __name__ == "__main__":
    main()
