"""How fast each stage is, against the way its peers take it: `python -m benchmarks NAME`."""
