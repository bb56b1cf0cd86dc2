"""The parts of the check, a module each, whose ``items(setting)`` are run in turn."""
