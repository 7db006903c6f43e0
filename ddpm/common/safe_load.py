"""Read files of tensors that may be corrupt or malicious: size limits, checksums, weights only."""

import io
import itertools
import json
import os
import pickletools
import re
import warnings
import zipfile
import zlib

import torch

LONGEST = 2**22  # characters of a config, which has a few thousand; more would fill the memory
HARMLESS = re.compile(
    r"collections OrderedDict|torch._utils _rebuild_(tensor|tensor_v2|parameter)|torch(.storage)? "
    r"\w+Storage"
)
LEGACY = 5  # consecutive pickles in a file of torch before 1.6


class WrongFormat(ValueError):
    """Says why a file is not one of torch's."""


class CorruptFile(ValueError):
    """A file whose bytes were damaged; an older checkpoint may be intact."""

    def __init__(self, path, why):
        self.path = path
        self.why = " ".join(str(why).split())[:200]
        super().__init__(
            f"{path} is damaged or not a checkpoint of ddpm ({self.why}); use another file"
        )


def read(path, tensors=True):
    """Read dicts, lists, strings, numbers and memory-mapped tensors that torch.save wrote.

    Raises CorruptFile for an unreadable file or a wrong checksum (of tensor data only if `tensors`)
    and ValueError for other content, or tensors larger than their data.
    """
    with open(path, "rb") as file:
        reason = "its end is missing, or torch did not write it"
        try:
            zipped = file.read(4) == b"PK\3\4"  # torch's own test
            file.seek(0)
            if zipped:
                reason = "the list of records at its end is incomplete"
                named = set(names_in_zip(file, tensors))
            else:
                named = set(itertools.chain(*(names_in(file) for _ in range(LEGACY))))
        except WrongFormat as error:
            raise CorruptFile(path, error) from None
        except Exception:  # zipfile and pickletools raise many types
            raise CorruptFile(path, reason) from None
    if unknown := sorted(name for name in named if not HARMLESS.fullmatch(name)):
        raise ValueError(
            f"{path} holds more than tensors, numbers and words: {unknown[0]!r}; use another file"
        )
    try:
        with warnings.catch_warnings():  # torch warns of files that are refused below
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        raise CorruptFile(path, error) from None
    for tensor in tensors_in(content):
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{path} does not hold the data of its tensor of shape {tuple(tensor.shape)}; use "
                "another file"
            )
    return content


def names_in_zip(file, tensors=True):
    """The globals that torch's zip names; verifies checksums, those of tensors if `tensors`."""
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if (
            any(record.compress_type for record in records)
            or sum(record.file_size for record in records) > os.fstat(file.fileno()).st_size
        ):
            raise WrongFormat("its records claim to be longer than it is")
        if len({record.filename.lower() for record in records}) < len(records):
            raise WrongFormat("two of its records have one name")
        if tensors and (torn := archive.testzip()):
            raise WrongFormat(f"{torn} does not fit its checksum")
        pickled = [record for record in records if record.filename.endswith("/data.pkl")]
        if len(pickled) != 1:
            raise WrongFormat("it is a zip file that torch did not write")
        # reading to the end verifies the checksum
        return names_in(io.BytesIO(archive.read(pickled[0])))


def names_in(file):
    """The globals that a pickle names, such as "collections OrderedDict"; it is not executed."""
    named = ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")
    return [
        str(value or code.name) for code, value, _ in pickletools.genops(file) if code.name in named
    ]


def tensors_in(content):
    """The tensors in nested dicts and lists."""
    stack = [content]
    seen = set()
    while stack:
        value = stack.pop()
        if id(value) in seen:  # a few bytes can describe an endless structure
            continue
        seen.add(id(value))
        if isinstance(value, torch.Tensor):
            yield value
        elif isinstance(value, (dict, list, tuple)):
            stack += value.values() if isinstance(value, dict) else value


def checksum(about, tensors):
    """The CRC-32 of the JSON value `about` and of names, dtypes, shapes and bytes of tensors."""
    named = sorted(tensors.items())
    header = [about, [(name, str(tensor.dtype), tensor.shape) for name, tensor in named]]
    crc = zlib.crc32(json.dumps(header).encode())
    for _, tensor in named:
        crc = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), crc)
    return crc
