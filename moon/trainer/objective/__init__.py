"""What is minimised: the unknown-aware loss, and methods to compare it with."""
