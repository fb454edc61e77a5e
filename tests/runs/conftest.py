"""The worker script of the multi-process tests, as a module and as ranks of a launcher."""

from support.ranks import launch, worker

__all__ = ["launch", "worker"]
