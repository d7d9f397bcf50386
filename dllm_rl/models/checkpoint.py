"""Weight files of a checkpoint folder: read one tensor at a time, written in shards."""

from __future__ import annotations

import hashlib
import json
import pickle
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path

import safetensors
import torch
from safetensors.torch import save_file
from torch import Tensor

from dllm_rl.errors import UserError, first_line, is_out_of_memory

SHARD_BYTES = 5_000_000_000
_INDEX = "model.safetensors.index.json"


def weight_files(folder: Path) -> list[Path]:
    """The weight files of a checkpoint folder: safetensors if there are any, else .bin.

    Raises:
        UserError: no weight files, or an index that lists a file that is not there.
    """
    for index_name, pattern in ((_INDEX, "*.safetensors"), ("pytorch_model.bin.index.json", "pytorch_model*.bin")):
        index = folder / index_name
        if index.is_file():
            try:
                names = sorted(set(json.loads(index.read_text())["weight_map"].values()))
            except (ValueError, KeyError, AttributeError) as error:
                raise UserError(f"{index}: not a weight index ({error!r}); download the checkpoint again") from error
            lost = [name for name in names if not (folder / name).is_file()]
            if lost:
                raise UserError(f"{folder}: {len(lost)} of {len(names)} weight files are missing, first {lost[0]}")
            return [folder / name for name in names]
        files = sorted(file for file in folder.glob(pattern) if not file.name.startswith("adapter_"))
        if files:
            return files
    hint = "; it holds an adapter: load its base model first" if (folder / "adapter_config.json").is_file() else ""
    raise UserError(f"{folder}: no *.safetensors or pytorch_model*.bin weights{hint}")


def sampled_digest(files: Sequence[Path], pieces: int = 64, size: int = 1 << 20) -> str:
    """A digest of weight files from their sizes, their ends and pieces spread evenly between: seconds at any size."""
    made = hashlib.blake2b(digest_size=16)
    for file in files:
        length = file.stat().st_size
        made.update(f"{file.name} {length}".encode())
        with file.open("rb") as handle:
            for start in sorted({(length - size) * i // (pieces - 1) for i in range(pieces)} if length > size else {0}):
                handle.seek(max(0, start))
                made.update(handle.read(size))
    return made.hexdigest()


def read_weights(file: Path) -> Iterator[tuple[str, Tensor]]:
    """(name, tensor) of a weight file, on the CPU, one at a time.

    Raises:
        UserError: a damaged file.
    """
    try:
        if file.suffix == ".safetensors":
            with safetensors.safe_open(file, framework="pt", device="cpu") as handle:
                for name in handle.keys():  # noqa: SIM118 (safe_open is not a mapping)
                    yield name, handle.get_tensor(name)
        else:
            yield from torch.load(file, map_location="cpu", weights_only=True, mmap=True).items()
    except (safetensors.SafetensorError, pickle.UnpicklingError, EOFError, RuntimeError) as error:
        if is_out_of_memory(error):  # the file is whole
            raise
        raise UserError(f"{file}: damaged weight file ({first_line(error)}); download or copy it again") from error


def write_weights(folder: Path, weights: Iterable[tuple[str, Tensor]]) -> None:
    """Write safetensors, in one file or in shards of at most SHARD_BYTES with an index.

    Args:
        folder: existing folder; weights of a previous save in it are replaced.
        weights: (name, tensor); may be produced lazily, one shard is held at a time.
    """
    parts: list[tuple[Path, list[str]]] = []
    shard: dict[str, Tensor] = {}
    total = filled = 0

    def flush() -> None:
        part = folder / f"weights-{len(parts) + 1}.part"  # the final name holds the number of shards
        save_file(shard, part, metadata={"format": "pt"})
        parts.append((part, list(shard)))
        shard.clear()

    for name, tensor in weights:
        size = tensor.numel() * tensor.element_size()
        if shard and filled + size > SHARD_BYTES:
            flush()
            filled = 0
        shard[name] = tensor.detach().cpu().contiguous()
        filled += size
        total += size
    flush()
    for stale in (*folder.glob("model-*-of-*.safetensors"), folder / "model.safetensors", folder / _INDEX):
        stale.unlink(missing_ok=True)
    if len(parts) == 1:
        parts[0][0].rename(folder / "model.safetensors")
        return
    weight_map: dict[str, str] = {}
    for number, (part, names) in enumerate(parts, start=1):
        file = f"model-{number:05d}-of-{len(parts):05d}.safetensors"
        part.rename(folder / file)
        weight_map |= dict.fromkeys(names, file)
    index = {"metadata": {"total_size": total}, "weight_map": weight_map}
    (folder / _INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")
