"""The engines that execute a network, one a file: the numpy reference, the native runtime, LiteRT."""
