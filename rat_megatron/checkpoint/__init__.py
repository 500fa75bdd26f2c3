"""Checkpoints of Megatron on the disk, and folders of Hugging Face models."""

TRACKER_NAME = "latest_checkpointed_iteration.txt"  # beside the folders iter_*: the iteration to resume from
