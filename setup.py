"""Lets tools that look for ``setup.py`` install the package; its metadata is in ``pyproject.toml`` alone."""

from setuptools import setup

setup()
