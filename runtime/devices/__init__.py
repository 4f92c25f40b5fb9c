"""Where an engine runs: on this machine, or under an emulator."""
