"""What `make tables-gpu` runs: checks on the device, every row that needs a GPU and no weights, and their targets."""
