"""Where an engine runs: under an emulator here, or on a device that ssh or adb reaches; a board's state."""
