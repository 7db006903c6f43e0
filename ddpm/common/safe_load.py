"""Reads files of tensors without running code from them: size limits, checksums, weights only.

A file may be damaged or malicious. `WrongFormat` means that it is not such a file, `CorruptFile`
that it was one.
"""

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

LONGEST = 2**22  # characters of a config, which has some thousand: more would only fill the memory
HARMLESS = re.compile(
    r"collections OrderedDict|torch._utils _rebuild_(tensor|tensor_v2|parameter)|torch(.storage)? "
    r"\w+Storage"
)
LEGACY = 5  # pickles in a file of torch before 1.6, one after the other


class WrongFormat(ValueError):
    """What is wrong in a file, in words."""


class CorruptFile(ValueError):
    """The bytes of a file are not those that were written: those of an older checkpoint may be."""

    def __init__(self, path, why):
        self.path = path
        self.why = " ".join(str(why).split())[:200]
        super().__init__(
            f"{path} is damaged or not a checkpoint of ddpm ({self.why}); use another file"
        )


def read(path, tensors=True):
    """What torch.save wrote: dicts, lists, words, numbers and tensors, which are mapped to the
    file.

    Raises CorruptFile where it cannot be read or a checksum does not fit (of tensors only if they
    are wanted), and ValueError where it holds anything else, or tensors that claim to be more than
    they are.
    """
    with open(path, "rb") as file:
        try:
            zipped = file.read(4) == b"PK\3\4"  # as torch tells
            file.seek(0)
            named = set(
                names_in_zip(file, tensors)
                if zipped
                else itertools.chain(*(names_in(file) for _ in range(LEGACY)))
            )
        except WrongFormat as misfit:
            raise CorruptFile(path, misfit) from None
        except Exception:  # there are as many as ways to be damaged, in words of Python's
            raise CorruptFile(
                path,
                "its list of records, at its end, is cut off or torn"
                if zipped
                else "its end is missing, or it is no file of torch's",
            ) from None
    if unknown := sorted(name for name in named if not HARMLESS.fullmatch(name)):
        raise ValueError(
            f"{path} holds more than tensors, numbers and words: {unknown[0]!r}; use another file"
        )
    try:
        with warnings.catch_warnings():  # of torch, about a file that is refused below
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True, mmap=zipped)
    except Exception as error:
        raise CorruptFile(path, error) from None
    for tensor in tensors_in(content):
        if tensor.layout != torch.strided or tensor.nbytes > tensor.untyped_storage().nbytes():
            raise ValueError(
                f"{path} has a tensor of {tuple(tensor.shape)} that it does not hold; use another "
                "file"
            )
    return content


def names_in_zip(file, tensors=True):
    """What the pickle in a zip of torch's names, after it, and all tensors if they are wanted,
    were held against checksums.
    """
    with zipfile.ZipFile(file) as archive:
        records = archive.infolist()
        if (
            any(one.compress_type for one in records)
            or sum(one.file_size for one in records) > os.fstat(file.fileno()).st_size
        ):
            raise WrongFormat("its records claim to be longer than it is")
        if len({one.filename.lower() for one in records}) < len(records):
            raise WrongFormat("two of its records have one name")
        if tensors and (torn := archive.testzip()):
            raise WrongFormat(f"{torn} does not fit its checksum")
        pickled = [one for one in records if one.filename.endswith("/data.pkl")]
        if len(pickled) != 1:
            raise WrongFormat("it is a zip, and not one of torch's")
        # which reads to the end, where the checksum is looked at
        return names_in(io.BytesIO(archive.read(pickled[0])))


def names_in(file):
    """What a pickle names, such as "collections OrderedDict"; nothing is built of it."""
    named = ("GLOBAL", "STACK_GLOBAL", "INST", "EXT1", "EXT2", "EXT4")
    return [
        str(value or code.name) for code, value, _ in pickletools.genops(file) if code.name in named
    ]


def tensors_in(content):
    """The tensors in nested dicts and lists."""
    waiting = [content]
    seen = set()
    while waiting:
        one = waiting.pop()
        if id(one) in seen:  # or a few bytes could be walked for ever
            continue
        seen.add(id(one))
        if isinstance(one, torch.Tensor):
            yield one
        elif isinstance(one, (dict, list, tuple)):
            waiting += one.values() if isinstance(one, dict) else one


def checksum(about, tensors):
    """The CRC-32 of names, types, shapes and bytes of tensors, and of what else is told about
    them.
    """
    named = sorted(tensors.items())
    found = zlib.crc32(
        json.dumps([about, [(name, str(one.dtype), one.shape) for name, one in named]]).encode()
    )
    for _, tensor in named:
        found = zlib.crc32(tensor.reshape(-1).view(torch.uint8).numpy(), found)
    return found
