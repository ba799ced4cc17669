"""Reading checkpoint files: safetensors, torch, and pickles of numpy arrays such as Paddle's `.pdparams`.

Nothing in a file is run: torch's are read by its own restricted unpickler, the others by `tokenmix.runtime.pickles`.
The kind is told by the first bytes, not by the name.
"""

from __future__ import annotations

import os
import pickle
import re
import warnings
import zipfile
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tokenmix.dsl.diagnostics import nearest
from tokenmix.runtime.pickles import PickledArray, UnsafePickle, read_pickle

if TYPE_CHECKING:
    import torch

__all__ = ["Checkpoint", "CheckpointError", "WeightsError", "as_tensor", "read_checkpoint"]

# What legacy torch files (before 1.6) begin with, behind the two bytes of the pickle's protocol.
_TORCH_LEGACY = b"\x8a\nl\xfc\x9cF\xf9 j\xa8P\x19."
_SPLIT = "UnpackBigParamInfor@@"  # where Paddle notes which arrays it cut up (pickle protocols 2 and 3)


class WeightsError(ValueError):
    """Weights cannot be loaded. Nothing was changed."""


class CheckpointError(WeightsError):
    """A file or mapping is no checkpoint that can be read."""


@dataclass(frozen=True)
class Checkpoint:
    """What a file holds.

    Attributes:
        name: how messages call it.
        kind: safetensors, torch, pickle, or `state dict` for one that was handed over.
        content: names -> tensors, nested entries, anything else.
        metadata: texts beside the tensors, of safetensors.
    """

    name: str
    kind: str
    content: Mapping[str, Any]
    metadata: Mapping[str, str] = field(default_factory=dict)

    @property
    def entries(self) -> dict[str, int]:
        """Names of nested entries that hold tensors -> how many."""
        nested = {name: value for name, value in self.content.items() if isinstance(value, Mapping)}
        # One mapping may stand under many names.
        counts = {id(value): sum(map(_is_array, value.values())) for value in _distinct(nested.values())}
        return {name: counts[id(value)] for name, value in nested.items() if counts[id(value)]}

    def state(self, entry: str | None) -> tuple[dict[str, torch.Tensor], dict[str, str]]:
        """Tensors by name, and what else there is by name, at the top or in one nested entry.

        Raises:
            CheckpointError: if there is no such entry, or an array that is not of numbers, or a name that is no text.
        """
        content = self.content
        if entry is not None:
            found = content.get(entry)
            if not isinstance(found, Mapping):
                known = list(self.entries)
                near = nearest(entry, known)
                help = f"did you mean `{near[0]}`?" if near else f"entries with weights: {', '.join(known) or 'none'}"
                raise CheckpointError(f"{self.name} has no entry `{entry}` that holds weights; {help}")
            content = _checked(found, f"{self.name}, entry {entry}")
        tensors: dict[str, torch.Tensor] = {}
        others: dict[str, str] = {}
        made: dict[int, tuple[Any, torch.Tensor]] = {}  # an array under many names is one tensor
        for name, value in content.items():
            if _is_array(value):
                array = value[1] if isinstance(value, tuple) else value
                if id(array) not in made:
                    made[id(array)] = array, as_tensor(array, f"{self.name}, {name}")
                tensors[name] = made[id(array)][1]
            else:
                others[name] = type(value).__name__
        return tensors, others


def _distinct(values: Iterable[Any]) -> list[Any]:
    return list({id(value): value for value in values}.values())


def _is_array(value: Any) -> bool:
    # Paddle writes single tensors as (name, array).
    if isinstance(value, tuple) and len(value) == 2 and isinstance(value[0], str):
        value = value[1]
    return isinstance(value, PickledArray) or (hasattr(value, "shape") and hasattr(value, "dtype"))


def as_tensor(value: Any, what: str) -> torch.Tensor:
    """A tensor of the numbers in a tensor or array. Raises `CheckpointError`."""
    import numpy
    import torch

    if isinstance(value, tuple):
        value = value[1]
    if isinstance(value, PickledArray):
        try:
            value = value.numpy()
        except (ValueError, OverflowError) as error:
            raise CheckpointError(f"{what}: no array can be made of it ({_short(error)})") from None
    if isinstance(value, torch.Tensor):
        if value.layout != torch.strided or value.is_quantized or value.is_meta:
            raise CheckpointError(f"{what}: a sparse, quantised or meta tensor has no numbers to load")
        return value.detach()
    array = numpy.asarray(value)
    if array.dtype.kind not in "fiub":
        raise CheckpointError(f"{what}: an array of {array.dtype} holds no weights")
    if not array.dtype.isnative:
        array = array.astype(array.dtype.newbyteorder("="))
    if not array.flags.writeable or any(stride < 0 for stride in array.strides):
        array = array.copy()  # torch shares memory and would write to it
    try:
        return torch.from_numpy(array)
    except TypeError:
        raise CheckpointError(f"{what}: torch knows no {array.dtype}") from None


def read_checkpoint(source: str | os.PathLike | Mapping[str, Any]) -> Checkpoint:
    """A file or state dict as a checkpoint.

    Raises:
        CheckpointError: if it cannot be read, is cut off or holds anything unsafe.
    """
    if isinstance(source, Mapping):
        return Checkpoint("the state dict", "state dict", _checked(source, "the state dict"))
    try:
        path = Path(source)
    except TypeError:
        raise CheckpointError(
            f"weights are read from a path or a state dict, not from a {type(source).__name__}"
        ) from None
    try:
        if path.is_dir():
            raise CheckpointError(f"{path} is a folder; name the file in it")
        if not path.is_file():
            near = nearest(path.name, sorted(p.name for p in path.parent.glob("*"))) if path.parent.is_dir() else []
            help = f"; did you mean `{path.with_name(near[0])}`?" if near else ""
            raise CheckpointError(f"there is no file {path}{help}")
        with path.open("rb") as file:
            start = file.read(64)
        if not start:
            raise CheckpointError(f"{path} is empty; fetch it again")
        return _READERS[_kind(path, start)](path)
    except OSError as error:
        raise CheckpointError(f"{path} cannot be read: {error.strerror or error}") from None
    except MemoryError:
        raise CheckpointError(f"{path} does not fit into memory") from None


def _kind(path: Path, start: bytes) -> str:
    if start.startswith(b"PK\x03\x04") or (start[:1] == b"\x80" and start[2:].startswith(_TORCH_LEGACY)):
        return "torch"
    if len(start) > 8 and start[8:9] == b"{":  # the header of safetensors: its length, then JSON
        return "safetensors"
    if start[:1] == b"\x80" or start[:2] in (b"(d", b"}q"):
        return "pickle"
    if path.suffix == ".safetensors":
        return "safetensors"
    shown = "a page of HTML: the download led to a web page" if b"<" in start[:16] else "no checkpoint that is known"
    raise CheckpointError(
        f"{path} is {shown}; what is read are safetensors, torch files and pickles of numpy arrays (.pdparams)"
    )


def _safetensors(path: Path) -> Checkpoint:
    from tokenmix.runtime.module import require_torch

    require_torch("safetensors")
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            names = list(file.keys())
            return Checkpoint(
                str(path), "safetensors", {name: file.get_tensor(name) for name in names}, file.metadata() or {}
            )
    except SafetensorError as error:
        raise CheckpointError(f"{path} is cut off or no safetensors file ({error}); fetch it again") from None


def _torch(path: Path) -> Checkpoint:
    from argparse import Namespace

    import torch

    try:
        if zipfile.is_zipfile(path):
            with zipfile.ZipFile(path) as archive:
                entries = archive.infolist()
            if any(entry.filename.endswith(".npy") for entry in entries):
                raise CheckpointError(f"{path} is an archive of numpy; hand it over as dict(numpy.load(file))")
            # torch stores without compressing: a file that unfolds to much more than its size is none of torch's.
            if sum(entry.file_size for entry in entries) > 2 * path.stat().st_size:
                raise CheckpointError(f"{path} unfolds to more than its size; torch writes no such files")
        # Training scripts keep their settings beside the weights. A Namespace holds names and values, no code.
        with torch.serialization.safe_globals([Namespace]), warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of unknown protocols, before the error
            with path.open("rb") as file:  # a path would be read by what it is called
                content = torch.load(file, map_location="cpu", weights_only=True)
    except pickle.UnpicklingError as error:
        named = re.search(r"(?:GLOBAL|class) ([\w.]+)", str(error))
        if named is not None:
            raise CheckpointError(
                f"{path} was refused: it asks for the global {named[1]}, which is not run; "
                "save the state dict alone (tensors by name) and load that"
            ) from None
        raise CheckpointError(f"{path} was refused by torch's reader of weights: {_short(error)}") from None
    except (CheckpointError, MemoryError):
        raise
    except Exception as error:  # on bytes that are not its own, torch's reader raises almost anything
        raise CheckpointError(f"{path} is cut off or no torch checkpoint ({_short(error)}); fetch it again") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not a state dict")
    for tensors in (content, *(v for v in content.values() if isinstance(v, Mapping))):
        for name, tensor in tensors.items():
            if isinstance(tensor, torch.Tensor) and tensor.layout == torch.strided and not _is_backed(tensor):
                shown = name if isinstance(name, str) else f"a {type(name).__name__}"
                raise CheckpointError(f"{path}: {shown} is larger than its bytes; save it with `.contiguous()`")
    return Checkpoint(str(path), "torch", _checked(content, str(path)))


def _is_backed(tensor: torch.Tensor) -> bool:
    return tensor.is_meta or tensor.numel() * tensor.element_size() <= tensor.untyped_storage().nbytes()


def _short(error: BaseException) -> str:
    text = " ".join(str(error).split()) or type(error).__name__
    return text if len(text) < 160 else f"{text[:150]} ..."


def _pickle(path: Path) -> Checkpoint:
    try:
        content = read_pickle(path)
    except UnsafePickle as error:
        raise CheckpointError(
            f"{path} was refused: {error}; a checkpoint is a pickle of numpy arrays by name and nothing else"
        ) from None
    except (ValueError, OverflowError) as error:
        raise CheckpointError(f"{path} is cut off or no pickle ({_short(error)}); fetch it again") from None
    if not isinstance(content, Mapping):
        raise CheckpointError(f"{path} holds a {type(content).__name__}, not arrays by name")
    return Checkpoint(str(path), "pickle", _put_together(_checked(content, str(path)), path))


def _put_together(content: Mapping[str, Any], path: Path) -> Mapping[str, Any]:
    """Arrays that Paddle cut up, whole again."""
    if _SPLIT not in content:
        return content
    import numpy

    rest = {name: value for name, value in content.items() if name != _SPLIT}
    used: set[int] = set()
    try:
        for name, cut in content[_SPLIT].items():
            arrays = [rest.pop(part) for part in cut["slices"]]
            for array in arrays:
                if id(array) in used:
                    raise ValueError  # one piece many times: a small file would make large arrays
                used.add(id(array))
            pieces = [array.numpy() for array in arrays]
            shape = tuple(int(n.numpy() if isinstance(n, PickledArray) else n) for n in cut["OriginShape"])
            rest[str(name)] = numpy.concatenate(pieces).reshape(shape)
    except (AttributeError, KeyError, OverflowError, TypeError, ValueError):
        raise CheckpointError(f"{path}: the pieces named under {_SPLIT} make no whole array; fetch it again") from None
    return rest


def _checked(content: Mapping[str, Any], what: str) -> Mapping[str, Any]:
    wrong = next((name for name in content if not isinstance(name, str)), None)
    if wrong is not None:
        # Its value is not shown: there are numbers, and tuples of tuples, that cannot be written out.
        raise CheckpointError(f"{what} has a key of type {type(wrong).__name__}; the names of weights are texts")
    return content


_READERS = {"safetensors": _safetensors, "torch": _torch, "pickle": _pickle}
