"""The mean of a run's weights over several iterations: while the learning rate is high, a better model than the last one.

Sources: latest weight averaging, arXiv 2306.03241; Polyak averaging of checkpoints in Llama 3, arXiv 2407.21783.
"""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

from torch import Tensor

from rat_megatron.checkpoint.hashes import check_hashes, iterations
from rat_megatron.checkpoint.torch_dist import ARCHITECTURE, StoredTensor, TorchDistCheckpoint, find_iteration, write_torch_dist
from rat_megatron.convert.megatron_args import config_from_args
from rat_megatron.convert.megatron_weights import MegatronWeights
from rat_megatron.errors import UserError
from rat_megatron.model.architecture import OPTIONS, ROTARY

_SAME = (*ARCHITECTURE, *OPTIONS, *ROTARY, "kv_channels", "num_query_groups", "ffn_hidden_size", "layernorm_epsilon")


def find_iterations(checkpoint: Path, last: int | None, steps: list[int]) -> list[Path]:
    """The folders of these steps of a checkpoint, in order, or of the ``last`` so many up to the latest; raises UserError."""
    if last is not None and steps:
        raise UserError("--last and --iteration cannot both be given: name the iterations, or say how many")
    if last is not None and last < 1:
        raise UserError(f"--last {last} is no number of iterations: give 1 or more")
    if twice := [step for step in steps if steps.count(step) > 1]:
        raise UserError(f"--iteration {twice[0]} is given twice: name every iteration once")
    if steps:
        return [find_iteration(checkpoint, step) for step in sorted(steps)]
    latest = find_iteration(checkpoint)
    if latest == checkpoint:
        raise UserError(f"{checkpoint} is one iteration: give the folder around it, that --save wrote")
    found = [folder for folder in iterations(checkpoint) if folder.name <= latest.name]  # later ones are of a run that was taken back
    if len(found) < last:
        there = ", ".join(folder.name for folder in found) or "none"
        raise UserError(f"{checkpoint} has fewer than {last} iterations to average ({there}): give a smaller --last, or another folder")
    return found[-last:]


class Average:
    """The mean of several iterations' weights. Raises UserError unless each is a whole checkpoint of the same RAT+ model."""

    def __init__(self, folders: list[Path]):
        for folder in folders:
            check_hashes(folder)
        self._sources = [TorchDistCheckpoint(folder) for folder in folders]
        self._newest = self._sources[-1]
        self._common = self._newest.common()
        self.iterations = [int(folder.name.removeprefix("iter_")) for folder in folders]
        self._keys = MegatronWeights(self._newest, config_from_args(self._common["args"], self._newest.folder, None)).keys
        self.dtypes = {self._newest.tensors[key].properties.dtype for key in self._keys}
        for source in self._sources[:-1]:
            self._check_same(source)

    def write(self, folder: Path) -> None:
        """Writes it as one torch_dist checkpoint, with the newest one's arguments and FP8 state, whose scales fit better than new ones."""
        tensors = {key: _stored(key, self._newest) for key in self._keys}
        args = Namespace(**vars(self._common["args"]) | {"rat_averaged_iterations": self.iterations})
        kept = {name: self._common[name] for name in ("checkpoint_version", "content_metadata") if name in self._common}
        common = kept | {"args": args, "iteration": 0, "num_floating_point_operations_so_far": 0}
        objects = {key: self._newest.read_object(key) for key in self._newest.objects if "_extra_state" in key}
        write_torch_dist(folder, tensors, lambda key, layer: self._mean(key, layer if tensors[key].layers else None), common, objects)

    def _mean(self, key: str, index: int | None) -> Tensor:
        total = None
        for source in self._sources:
            weight = source.read(key, index)
            if not weight.isfinite().all():
                raise UserError(f"{source.folder} has weights that are not finite, in {key}: leave it out")
            total = weight.double() if total is None else total.add_(weight)
        return total.div_(len(self._sources)).to(self._newest.tensors[key].properties.dtype)

    def _check_same(self, source: TorchDistCheckpoint) -> None:
        here, there, args = self._newest.folder.name, source.folder.name, source.args()
        for name in _SAME:
            value, other = getattr(self._common["args"], name, None), getattr(args, name, None)
            if value != other:
                raise UserError(f"{there} and {here} are different models ({name} {other} and {value}): average iterations of one run")
        for key in self._keys:
            if key not in source.tensors:
                raise UserError(f"{there} has no {key}, which {here} has: average iterations that were saved by the same kind of layers")
            shape, other = self._newest.tensors[key].size, source.tensors[key].size
            if shape != other:
                raise UserError(f"{there} and {here} have {tuple(other)} and {tuple(shape)} for {key}: average iterations of one run")


def _stored(key: str, source: TorchDistCheckpoint) -> StoredTensor:
    """A tensor of the same name, stacked where the source's is."""
    size, dtype = source.tensors[key].size, source.tensors[key].properties.dtype
    stacked = key.startswith("decoder.layers.") and not key.split(".")[2].isdigit()
    return StoredTensor(size[1:], dtype, size[0]) if stacked else StoredTensor(size, dtype)
