"""From calibration images to an int8 graph: observing ranges, choosing scales, rounding weights."""
