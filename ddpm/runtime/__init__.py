"""The machine: device and number type, ranks, memory, compilation, signals."""
