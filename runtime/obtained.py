"""How a figure was obtained, in one of three words.

``measured``: the artefact ran on the target's own hardware. ``rehearsed``: its own code ran on an emulator or another
device of the same API; its outputs count, its time does not. ``estimated``: computed from a named model of the machine.
"""

MEASURED, REHEARSED, ESTIMATED = "measured", "rehearsed", "estimated"
