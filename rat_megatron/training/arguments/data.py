"""The streams that a run trains and is validated on, in Megatron's flags, and what follows from them.

--data-path has both; or --train-data-path the former and --valid-data-path the latter, as in Megatron. With --multiple-validation-sets
every stream of the latter is a set of its own, with a loss of its own, under its --validation-set-names or Megatron's 0, 1, ...
"""

from __future__ import annotations

import re
from argparse import Namespace
from typing import Any

from rat_megatron.data.loader.batches import samples_for_validation
from rat_megatron.data.loader.order import order_facts
from rat_megatron.data.loader.streams import Stream, check_streams, parse_data_path
from rat_megatron.errors import UserError
from rat_megatron.training.arguments.batch_size import batch_steps
from rat_megatron.training.arguments.flags import given

ONE_SET = ""  # the name of the only validation set


def check_data(args: Namespace) -> dict[str, Any]:
    """Raises UserError unless the streams are whole and fit the model and each other; returns the arguments that follow from them.

    Among these, ``rat_validation_sets`` has the iterations of an evaluation of each set by its name, in the order of the streams;
    ``data_path`` and ``eval_iters`` are as if all had been given by --data-path and --eval-iters.
    """
    _check_flags(args)
    words = args.data_path or args.train_data_path
    streams, validation = parse_data_path(words), parse_data_path(args.valid_data_path or words)
    vocab_size = args.vocab_size if given("--vocab-size") or args.rat_architecture_from else None
    limits = {"seq_length": args.seq_length, "vocab_size": vocab_size, "cache": args.data_cache_path}
    meta = check_streams(streams, **limits, cache_limit=args.rat_data_cache_limit, validation=validation)
    valid_meta = check_streams(validation, **limits) if args.valid_data_path else meta
    for name, what in (("tokenizer_hash", "tokenizer"), ("eod_id", "end-of-document token")):
        if getattr(valid_meta, name) != getattr(meta, name):
            raise UserError(f"--train-data-path and --valid-data-path were prepared with another {what}: prepare one of them anew.")
    if meta.train_samples < (batch := batch_steps(args)[-1][1]):
        raise UserError(f"--data-path has {meta.train_samples} training samples, fewer than a global batch of {batch}: prepare more text")
    sets = _validation_sets(args, validation, valid_meta.has_validation)
    return {
        "vocab_size": vocab_size or max(meta.vocab_size, valid_meta.vocab_size),
        "rat_eod_id": meta.eod_id,
        "rat_tokenizer_path": meta.tokenizer_path,
        "rat_tokenizer_name": meta.tokenizer_name,
        "rat_tokenizer_hash": meta.tokenizer_hash,
        "rat_data_order": order_facts(streams, seed=args.seed, cache=args.data_cache_path),
        "rat_validation_sets": sets,
        "data_path": words,
        "eval_iters": max(sets.values(), default=0),
    }


def validation_streams(args: Namespace) -> list[list[Stream]]:
    """The streams of each validation set, as ``rat_validation_sets`` has them."""
    streams = parse_data_path(args.valid_data_path or args.data_path)
    return [streams] if ONE_SET in args.rat_validation_sets else [[stream] for stream in streams]


def _check_flags(args: Namespace) -> None:
    apart = [flag for flag in ("train", "valid") if getattr(args, f"{flag}_data_path")]
    if args.data_path and apart:
        raise UserError(
            f"--{apart[0]}-data-path and --data-path cannot both be given: "
            "name the streams by --data-path, or by --train-data-path and --valid-data-path"
        )
    if not args.data_path and not apart:
        raise UserError("--data-path is missing: give one or more folders written by 'rat-megatron prepare', with weights if wanted")
    if not args.data_path and not args.train_data_path:
        raise UserError("--train-data-path is missing beside --valid-data-path: give it too, or --data-path for both")
    if args.train_data_path and not args.valid_data_path and _validates(args):
        raise UserError("--valid-data-path is missing beside --train-data-path: give it too, or --data-path for both, or --eval-iters 0")
    if args.validation_set_names and not args.multiple_validation_sets:
        raise UserError("--validation-set-names needs --multiple-validation-sets: give both, or leave it out")


def _validates(args: Namespace) -> bool:
    return bool(args.full_validation or args.eval_iters)


def _validation_sets(args: Namespace, streams: list[Stream], has_validation: bool) -> dict[str, int]:
    """Iterations of an evaluation of each set; none where nothing is evaluated."""
    if not _validates(args):
        return {}
    if not has_validation:
        flag = "--valid-data-path" if args.valid_data_path else "--data-path"
        raise UserError(f"the data of {flag} has no validation split: give --eval-iters 0, or prepare it with --val-fraction")
    sets = _named(args.validation_set_names, streams) if args.multiple_validation_sets else {ONE_SET: streams}
    if not args.full_validation:
        return dict.fromkeys(sets, args.eval_iters)
    batch = args.eval_global_batch_size or batch_steps(args)[-1][1]
    iterations = {name: samples_for_validation(of_set, args.data_cache_path) // batch for name, of_set in sets.items()}
    for name, count in iterations.items():
        if not count:
            paths = ", ".join(stream.path for stream in sets[name])
            raise UserError(f"the validation split of {paths} is no whole batch of {batch} samples: lower --eval-global-batch-size")
    return iterations


def _named(names: list[str] | None, streams: list[Stream]) -> dict[str, list[Stream]]:
    if any(stream.weight is not None for stream in streams):
        raise UserError("--multiple-validation-sets has a loss for each stream: name them without weights")
    names = names or [str(index) for index in range(len(streams))]
    if len(names) != len(streams):
        raise UserError(f"--validation-set-names has {len(names)} names for {len(streams)} validation sets: give one for each")
    for name in names:
        if not re.fullmatch(r"[\w.+-]+", name) or names.count(name) > 1:
            raise UserError(f"--validation-set-names {' '.join(names)}: every name must be another, of letters, digits and . _ + -")
    return {name: [stream] for name, stream in zip(names, streams, strict=True)}
