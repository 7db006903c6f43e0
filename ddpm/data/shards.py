"""Samples by index from local or remote shards, through MosaicML Streaming.

That library reads, transports and decompresses shards; the order of images is ours. Processes that
use a folder at the same time, of any job, wait for each other by file locks.
"""

import hashlib
import os
from contextlib import nullcontext, suppress

import numpy as np

from ddpm.common.errors import one_line_with_type as one_line
from ddpm.common.files import expand_user, file_lock, make_folder

try:
    from streaming import Stream
    from streaming.base.spanner import Spanner
    from streaming.base.util import bytes_to_int
    from streaming.base.world import World
except ImportError as error:
    raise ValueError(
        f"{(error.name or 'streaming').partition('.')[0]} is missing; pip install -e '.[streaming]'"
    ) from None

# downloads of a shard for one sample: another process may remove it before it is read
TRIES = 8


class Shards:
    """`shards[index]`: a sample by column; `columns`: encodings; `digest`: sha256 of the index.

    Missing shards are downloaded on demand from `remote`, a folder or an address such as
    s3://bucket/images, and compared with their checksums if they have any. Beyond `cache_limit`
    ("200gb") the oldest are removed. Raises ValueError for missing, corrupt or unreachable shards.
    """

    def __init__(self, folder, remote="", cache_limit=""):
        self.given = (folder, remote, cache_limit)
        self.folder = expand_user(folder)
        if "://" not in remote:
            remote = str(expand_user(remote).resolve()) if remote else ""
        self.remote = "" if remote == str(self.folder.resolve()) else remote
        if not self.remote and not (self.folder / "index.json").is_file():
            raise ValueError(
                f"there is no {os.path.abspath(self.folder / 'index.json')!r}; give the path of a "
                "folder that MDSWriter of MosaicML Streaming wrote, or remote= where that is, in "
                "--config.data.source"
            )
        self.open()
        self.sizes = [len(shard) for shard in self.shards]
        self.spanner = Spanner(np.array(self.sizes))
        self.columns = {}
        for shard in self.shards:
            names = getattr(shard, "column_names", ())
            encodings = getattr(shard, "column_encodings", ())
            self.columns |= dict(zip(names, encodings, strict=True))
        self.digest = hashlib.sha256((self.folder / "index.json").read_bytes()).hexdigest()
        self.limit = self.bytes_of(cache_limit) if cache_limit else 0

    def __len__(self):
        return sum(self.sizes)

    def __getitem__(self, index):
        number, place = self.spanner[index]
        for _ in range(TRIES):
            try:
                return self.shards[number][place]
            except FileNotFoundError:
                self.download(number)
            except Exception as error:  # bytes that do not fit the columns
                raise ValueError(
                    f"sample {index} in {self.path(number)} is damaged ({one_line(error)}); "
                    "restore the shard"
                ) from None
        raise ValueError(
            f"shards of {self.folder} are removed before they can be read; raise "
            f"cache_limit={self.given[2]!r}"
        )

    def __reduce__(self):
        return Shards, self.given

    def open(self):
        """Read or download the index in this process: connections do not survive a fork."""
        self.process = os.getpid()
        try:
            lock = file_lock(make_folder(self.folder) / "index.lock") if self.remote else None
            with lock or nullcontext():
                self.stream = Stream(
                    remote=self.remote or None,
                    local=str(self.folder),
                    download_retry=2,
                    download_timeout=60,
                    keep_zip=False,
                )
                self.shards = self.stream.get_shards(World(1, 1, 1, 0), allow_unsafe_types=False)
            if not sum(map(len, self.shards)):
                raise ValueError("there is no sample in them")
            for path in map(self.path, range(len(self.shards))):
                if not path.resolve().is_relative_to(self.folder.resolve()):
                    raise ValueError(f"{path} is outside of the folder")
        except Exception as error:
            # there are eight kinds of storage, and more ways for a file to be wrong
            raise ValueError(
                f"cannot read shards from {self.remote or str(self.folder)!r} "
                f"({one_line(error)}); give a folder that MDSWriter of MosaicML Streaming wrote"
            ) from None
        self.stream.validate_hash = next(iter(self.shards[0].hashes), None)

    def path(self, number):
        return self.folder / self.shards[number].file_pairs[0][0].basename

    def lock(self, number):
        return file_lock(self.folder / f"{number:05}.lock")

    def download(self, number):
        """Download and unpack a shard while others wait for it; with a limit, remove old ones."""
        if self.process != os.getpid():
            self.open()
        with self.lock(number):
            try:
                self.stream.prepare_shard(self.shards[number])
            except Exception as error:
                if self.remote:  # what arrived is not what was sent
                    self.shards[number].evict()
                raise ValueError(
                    f"cannot get {self.path(number).name} from {self.remote or str(self.folder)!r} "
                    f"({one_line(error)}); restore it, or run again when the place can be reached"
                ) from None
        if self.limit:
            self.make_room()

    def make_room(self):
        """Remove the oldest shards until the folder is within the limit."""
        with file_lock(self.folder / "room.lock"):
            here = []
            for number in range(len(self.shards)):
                with suppress(FileNotFoundError):
                    here.append((self.path(number).stat().st_mtime_ns, number))
            excess = sum(self.shards[number].get_raw_size() for _, number in here) - self.limit
            for _, number in sorted(here)[:-1]:
                if excess > 0:
                    with self.lock(number):
                        excess -= self.shards[number].evict()

    def bytes_of(self, limit):
        """A limit in bytes; raises ValueError if shards do not fit or exist only here."""
        try:
            size = bytes_to_int(limit)
        except ValueError:
            raise ValueError(
                f"cannot read cache_limit={limit!r}; write such as '500mb' or '200gb'"
            ) from None
        largest = max(shard.get_max_size() for shard in self.shards)
        if not self.remote:
            raise ValueError(
                f"cache_limit={limit!r} would remove the only copy of shards; give remote=, or "
                "leave it out"
            )
        if size < 4 * largest:
            raise ValueError(
                f"cache_limit={limit!r} is below four shards of {largest:,} bytes; raise it, or "
                "make them smaller"
            )
        return size
