"""The C11 runtime that executes plans on the device, as sources to be compiled for each target."""
