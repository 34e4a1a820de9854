"""This service against what else would serve the same model on the same machine. See docs/performance.md."""
