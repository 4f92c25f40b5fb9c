"""The boards and phones Xceptile compiles for, one row each, with the sources of every row."""
