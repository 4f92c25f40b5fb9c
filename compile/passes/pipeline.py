"""Runs graph passes in order, with a check between them."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from ...models.graph import Graph
from .fold_batch_norm import fold_batch_norm
from .fuse_relu import fuse_relu
from .remove_dead import remove_dead

Pass = Callable[[Graph], Graph]

# What every imported float graph goes through; ``fold_input`` comes after, with the network's InputSpec.
FLOAT_PASSES: tuple[Pass, ...] = (remove_dead, fold_batch_norm, fuse_relu)


def run_passes(
    graph: Graph,
    passes: Sequence[Pass],
    verify: Callable[[Graph], None],
    keep: Callable[[str, Graph], None] = lambda name, graph: None,
) -> Graph:
    """Applies ``passes`` in order. ``verify`` sees the graph first and after every pass, and raises where it is broken;
    the error gets a note that names the pass. ``keep`` is shown the graph after every pass, with the pass' name.
    """
    verify(graph)
    for apply in passes:
        graph, name = apply(graph), getattr(apply, "__name__", str(apply))
        try:
            verify(graph)
        except Exception as error:
            error.add_note(f"after the pass {name}")
            raise
        keep(name, graph)
    return graph
