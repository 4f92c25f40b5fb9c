"""Rewrites of the graph, one a file; each is a function Graph -> Graph, verified after it ran."""
