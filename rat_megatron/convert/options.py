"""Options that several conversions have on the command line."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

Output = Annotated[Path, typer.Argument(help="Folder to write; must not exist or be empty.")]
Dtype = Annotated[str | None, typer.Option(help="float32 or bfloat16. Default: as stored.")]
ShardSize = Annotated[str, typer.Option(help="Largest size of one safetensors file, such as 500MB; memory follows it.")]
