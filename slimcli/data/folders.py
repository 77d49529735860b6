"""What a class folder is, in a folder of images and in a .tar of them.

The classes are the first level below the split: `cat` in cat/1.jpg and in cat/indoor/1.jpg. Hidden folders are none.
Of a .tar, leading folders that all images share are not counted: data/x/cat/1.jpg is a cat beside data/x/dog/1.jpg.
A file is an image if its name ends as those of a format that Pillow reads; every other one is skipped and counted.
"""

from __future__ import annotations

import io
import os
import posixpath
import re
import tarfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from PIL import Image

from slimcli.data.read import is_image_name, read_image
from slimcli.errors import DataError

#: names of splits that stand for each other
SYNONYMS = (("train", "training"), ("val", "validation", "valid", "eval", "evaluation", "test"))
#: folders that systems leave behind; names that begin with a dot are hidden too
SYSTEM_FOLDERS = {"__MACOSX", "__pycache__", "@eaDir", "$RECYCLE.BIN", "System Volume Information", "lost+found"}
SYSTEM_FILES = {"thumbs.db", "ehthumbs.db", "desktop.ini", "icon\r"}

#: the folders and the name of a file below a split
Parts = tuple[str, ...]


class InClasses(NamedTuple):
    """Files sorted into classes."""

    class_names: list[str]
    #: for each image: its place among the files that were given, and its class
    images: list[tuple[int, int]]
    notes: list[str]


@dataclass
class ImageFiles:
    """Image files with their classes; `read` is what `ImageSamples` takes."""

    paths: list[str]
    targets: list[int]

    def read(self, index: int) -> tuple[Image.Image, int]:
        return read_image(Path(self.paths[index])), self.targets[index]

    def name(self, index: int) -> str:
        return self.paths[index]


@dataclass
class TarImages:
    """Images in a .tar with their classes: of each its name, where its bytes begin and how many they are."""

    path: str
    places: list[tuple[str, int, int]]
    targets: list[int]

    def read(self, index: int) -> tuple[Image.Image, int]:
        _name, start, size = self.places[index]
        with open(self.path, "rb") as file:  # noqa: PTH123
            file.seek(start)
            content = file.read(size)
        return read_image(io.BytesIO(content), self.name(index)), self.targets[index]

    def name(self, index: int) -> str:
        return f"{self.path}/{self.places[index][0]}"


def open_folder(root: Path) -> tuple[ImageFiles, list[str], list[str]]:
    """The images of a split's folder, its class names, and notes of what was skipped.

    Raises `DataError` where a folder cannot be read, a class has no image, or it holds splits and not classes.
    """
    folders, files, notes = walk(root)
    found = by_class(str(root), folders, files)
    if len(found.class_names) == 1:
        inner = sorted({parts[1] for parts in files if len(parts) > 2})
        if inner:
            notes.append(f"{root}: holds one class, {found.class_names[0]}; the folders in it ({some(inner)}) are none")
    paths = [os.path.join(root, *files[place]) for place, _ in found.images]  # noqa: PTH118
    return ImageFiles(paths, [target for _, target in found.images]), found.class_names, found.notes + notes


def open_tar(path: Path) -> tuple[TarImages, list[str], list[str]]:
    """The images of a split's .tar, its class names, and notes of what was skipped. Raises `DataError`."""
    members, folders, notes = members_of(path)
    files = list(members)
    leading = _leading(path, files)
    depth = len(leading)
    below = [parts[depth:] if parts[:depth] == leading else ("/".join(parts),) for parts in files]
    classes = {parts[depth] for parts in folders if len(parts) > depth and parts[:depth] == leading}
    found = by_class(str(path), classes, below)
    places = [("/".join(files[place]), *members[files[place]]) for place, _ in found.images]
    return TarImages(str(path), places, [target for _, target in found.images]), found.class_names, found.notes + notes


def by_class(where: str, folders: Collection[str], files: Sequence[Parts]) -> InClasses:
    """Sort files into classes.

    Args:
        where: what holds them, for errors.
        folders: the first level of folders that are not hidden, those without a file too.
        files: the files below `where`, without hidden ones.

    Images without a folder for any class have no labels: there are no class names then.

    Raises:
        DataError: where there is no image, a class has none, or the folders are splits and not classes.
    """
    names = sorted({*folders, *(parts[0] for parts in files if len(parts) > 1)}, key=lambda name: (natural(name), name))
    images = [place for place, parts in enumerate(files) if is_image_name(parts[-1])]
    if not names and not images:
        raise DataError(
            f"{where}: holds no images in class folders: expected CLASS/image.jpg, a folder for every class"
        )
    if not names:
        # what learns or compares without labels takes them; `match_classes` refuses them where classes are needed
        images.sort(key=lambda place: (natural(files[place][-1]), files[place]))
        other = sorted(parts[-1] for parts in files if not is_image_name(parts[-1]))
        notes = [f"{where}: skipped {_counted(other, 'not named as an image that Pillow reads')}"] if other else []
        return InClasses([], [(place, 0) for place in images], notes)
    _check_names(where, names, any(len(parts) > 2 for parts in files))
    number = {name: index for index, name in enumerate(names)}
    inside = sorted(
        (place for place in images if len(files[place]) > 1), key=lambda p: (natural("/".join(files[p])), files[p])
    )
    counts = Counter(files[place][0] for place in inside)
    for name in names:
        if not counts[name]:
            others = sorted(parts[-1] for parts in files if len(parts) > 1 and parts[0] == name)
            held = f"none of its {len(others)} files ({some(others)}) is one" if others else "it is empty"
            raise DataError(
                f"{where}/{name}: this class folder holds no image that Pillow reads ({held}): "
                "add some or remove the folder"
            )
    notes = []
    if beside := sorted(parts[0] for parts in files if len(parts) == 1):
        notes.append(f"{where}: skipped {_counted(beside, 'beside the class folders')}")
    if other := sorted("/".join(parts) for parts in files if len(parts) > 1 and not is_image_name(parts[-1])):
        notes.append(f"{where}: skipped {_counted(other, 'not named as an image that Pillow reads')}")
    folded = Counter(name.casefold() for name in names)
    if alike := [name for name in names if folded[name.casefold()] > 1]:
        notes.append(f"{where}: classes whose names differ only in upper and lower case: {some(alike)}")
    return InClasses(names, [(place, number[files[place][0]]) for place in inside], notes)


def is_hidden(name: str) -> bool:
    """Whether a folder of that name is none of a user's."""
    return name.startswith(".") or name in SYSTEM_FOLDERS


def natural(text: str) -> list[str | int]:
    """What names are sorted by, as timm does: class2 before class10, in lower case."""
    parts = re.split(r"(\d+)", text.lower())
    return [int(part) if index % 2 else part for index, part in enumerate(parts)]


def find_images(folder: Path) -> list[Path]:
    """All images below a folder, without those of hidden folders, in order."""
    _, files, _ = walk(folder)
    return sorted(folder.joinpath(*parts) for parts in files if is_image_name(parts[-1]))


def _check_names(where: str, names: Sequence[str], nested: bool) -> None:
    splits = {word for group in SYNONYMS for word in group}
    if nested and all(name.lower() in splits for name in names):
        raise DataError(
            f"{where}: its folders {some(names)} are splits, not classes: name one of them as the split or the root"
        )
    forms: dict[str, str] = {}
    for name in names:
        try:
            name.encode()
        except UnicodeEncodeError:
            raise DataError(f"{where}: the class folder {name!a} has a name that is not UTF-8: rename it") from None
        other = forms.setdefault(unicodedata.normalize("NFC", name), name)
        if other != name:
            raise DataError(
                f"{where}: the class folders {other!a} and {name!a} have the same name, written with other characters: "
                "join them or rename one"
            )


def is_noise(name: str) -> bool:
    """Whether a file is skipped without a word: what systems leave behind, and hidden files that are no images."""
    return name.lower() in SYSTEM_FILES or (name.startswith(".") and not is_image_name(name))


def walk(root: Path) -> tuple[set[str], list[Parts], list[str]]:
    """First-level folders, files and notes of a folder. Links are followed, except those that lead back."""
    folders: set[str] = set()
    files: list[Parts] = []
    loops: list[str] = []
    #: folders to read: where, what is above them, and the real places that led there
    waiting: list[tuple[str, Parts, Parts]] = [(str(root), (), (os.path.realpath(root),))]
    while waiting:
        path, above, real = waiting.pop()
        for entry in _entries(path):
            parts = (*above, entry.name)
            if _is(entry.is_dir):
                if is_hidden(entry.name):
                    continue
                target = real
                if entry.is_symlink():
                    target = (*real, os.path.realpath(entry.path))
                    if any(f"{place}/".startswith(f"{target[-1]}/") for place in (*real, os.path.realpath(path))):
                        loops.append("/".join(parts))
                        continue
                if not above:
                    folders.add(entry.name)
                waiting.append((entry.path, parts, target))
            elif entry.is_symlink() and not above and not is_image_name(entry.name) and not Path(entry.path).exists():
                raise DataError(f"{entry.path}: is a link to {os.readlink(entry.path)}, which is not there")  # noqa: PTH115
            elif not is_noise(entry.name) and (_is(entry.is_file) or entry.is_symlink()):
                files.append(parts)
    return folders, files, [f"{root}: skipped links that lead back ({some(loops)})"] if loops else []


def _is(kind: Callable[[], bool]) -> bool:
    """What an entry is; one that cannot be reached, such as a link to itself, is neither file nor folder."""
    try:
        return kind()
    except OSError:
        return False


def _entries(path: str) -> Iterator[os.DirEntry[str]]:
    try:
        with os.scandir(path) as entries:
            yield from entries
    except OSError as error:
        raise DataError(f"{error.filename or path}: cannot be read: {error.strerror or error}") from error


def members_of(path: Path) -> tuple[dict[Parts, tuple[int, int]], set[Parts], list[str]]:
    """Of each file in a .tar where its bytes begin and how many they are, all folders, and notes.

    Of a name that comes twice the last counts, as for tar itself. Links are resolved within the .tar; a .tar in it is
    read as a folder of its name. Raises `DataError`.
    """
    try:
        with tarfile.open(path, "r:") as tar:
            return _members(path, tar)
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DataError(
            f"{path}: cannot be read as a .tar of images ({error}): expected one that is whole and not compressed"
        ) from error


def _members(path: Path, tar: tarfile.TarFile) -> tuple[dict[Parts, tuple[int, int]], set[Parts], list[str]]:
    members: dict[Parts, tuple[int, int]] = {}
    links: dict[Parts, Parts] = {}
    folders: set[Parts] = set()
    for member in tar:
        parts = parts_of(member.name)
        if not parts or any(is_hidden(part) for part in parts[:-1]):
            continue
        if member.isdir():
            if not is_hidden(parts[-1]):
                folders.add(parts)
        elif is_noise(parts[-1]):
            continue
        elif member.issparse():
            raise DataError(f"{path}/{member.name}: is stored with holes: make the .tar again without --sparse")
        elif member.isfile() and parts[-1].lower().endswith(".tar"):
            inner = tar.extractfile(member)
            with tarfile.open(fileobj=inner, mode="r:") as child:
                below, _, _ = _members(path / member.name, child)
            stem = (*parts[:-1], parts[-1][:-4])
            members |= {(*stem, *rest): (member.offset_data + at, size) for rest, (at, size) in below.items()}
        elif member.isfile():
            members[parts] = member.offset_data, member.size
        elif member.islnk():
            links[parts] = parts_of(member.linkname)
        elif member.issym():
            links[parts] = parts_of(posixpath.join(*parts[:-1], member.linkname))
    lost = []
    for parts, target in links.items():
        seen = {parts}
        while target in links and target not in seen:
            seen.add(target)
            target = links[target]
        if target in members:
            members[parts] = members[target]
        else:
            lost.append("/".join(parts))
    folders |= {parts[:depth] for parts in members for depth in range(1, len(parts))}
    notes = [f"{path}: skipped {_counted(lost, 'that links to what is not in it')}"] if lost else []
    return members, folders, notes


def parts_of(name: str) -> Parts:
    """The folders and the name in a member's path, whatever leads it: ./cat/1.jpg, /cat/1.jpg."""
    return tuple(part for part in posixpath.normpath(f"/{name}").split("/") if part)


def _leading(path: Path, files: Sequence[Parts]) -> Parts:
    """The folders that lead to the classes of a .tar: those that hold all images in folders of their own."""
    images = [parts for parts in files if is_image_name(parts[-1])]
    leading: Parts = ()
    while True:
        depth = len(leading)
        inside = [parts for parts in images if len(parts) > depth + 1]
        folders = {parts[depth] for parts in inside}
        if len(folders) != 1 or all(len(parts) == depth + 2 for parts in inside):
            return leading
        leading = (*leading, *folders)
        images = inside
        if any(len(parts) == depth + 2 for parts in inside):
            raise DataError(
                f"{path}: {'/'.join(leading)} holds images and folders of images: is it a class, or are they? "
                "Leave only one of the two in it"
            )


def _counted(names: Sequence[str], what: str) -> str:
    return f"{len(names)} file{'s' if len(names) > 1 else ''} {what} ({some(names)})"


def some(names: Sequence[str]) -> str:
    """The first few names, for a message."""
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
