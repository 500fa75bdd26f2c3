"""Context parallelism of RAT+ layers."""
