"""The front end: takes questions over HTTP, and hands them to workers as jobs."""

from importlib.metadata import version

VERSION = version("prismprune")
