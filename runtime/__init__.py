"""What runs and judges a compiled network: the integer contract, bundles and plans, engines, devices, verdicts."""
