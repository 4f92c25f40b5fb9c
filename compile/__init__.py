"""From a graph to a bundle: passes over the graph, kernels for a target, the backends, the pipeline and the CLI."""
