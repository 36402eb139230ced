"""What the command line offers besides generating: toy checkpoints, conversion, inspection, timing."""
