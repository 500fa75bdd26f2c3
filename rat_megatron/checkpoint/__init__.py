"""Checkpoints of Megatron on the disk, and folders of Hugging Face models."""

TRACKER_NAME = "latest_checkpointed_iteration.txt"  # beside the folders iter_*: the iteration to resume from
ADAPTED_NAME = "adapted_by"
"""A file in an iteration's folder, with a line for every run that started from it. While it is there, the iteration stays."""
