"""Classes of data and classes of a model: matched by name, never by their number alone."""

from __future__ import annotations

import copy
import csv
import difflib
import json
import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import tomli

from slimcli.errors import SlimError, parameter

if TYPE_CHECKING:
    from slimcli.data.samples import ImageSamples, StreamedImages

#: names said in a message before "and N more"
SAID = 5
#: classes of ImageNet-1k, which models of that many outputs have in the order of WordNet's numbers
IMAGENET = 1000

Samples = TypeVar("Samples", bound="ImageSamples | StreamedImages")


class TargetMap:
    """Turns the data's class numbers into the model's. An object, because loader processes receive it by pickle."""

    def __init__(self, indices: Sequence[int]) -> None:
        self.indices = list(indices)

    def __call__(self, target: Any) -> Any:
        return self.indices[int(target)]


def match_classes(
    samples: Samples,
    model_names: Sequence[str] | None,
    num_outputs: int,
    class_map: Mapping[str, str] | None = None,
) -> tuple[Samples, str | None]:
    """The samples with targets that are the model's, and a note where that needed a mapping.

    Args:
        samples: what `open_dataset` returned. It is not changed; where classes are mapped, a copy is returned whose
            `class_names` are the model's.
        model_names: the model's class names in the order of its outputs; None where they are not known. Then the
            number of classes must be that of the outputs, except that ImageNet's class folders (n01440764, ...) find
            their places among 1000 outputs.
        num_outputs: outputs of the classifier; 0 where there is none, and nothing is to be matched.
        class_map: the model's class for data classes that it calls otherwise; several may become one. A model without
            names takes the number of an output, from 0.

    Raises:
        SlimError: where the data has a class that the model does not have, or `class_map` names one that is unknown.
    """
    names = getattr(samples, "class_names", None)
    if not num_outputs:
        return samples, None
    if names is not None and not names:
        raise SlimError(
            f"the images lie in no class folders, so that nothing says which of the model's {num_outputs} classes they "
            "are of: expected CLASS/image.jpg, a folder for every class"
        )
    if names is None:
        if class_map:
            raise SlimError("class_map: the classes of this data have no names to map")
        return samples, None
    if model_names is not None and len(model_names) != num_outputs:
        raise SlimError(
            f"the model has {num_outputs} outputs and names for {len(model_names)} classes: its config.json is damaged"
        )
    if model_names is None:
        model_names = _imagenet_names(names, num_outputs)
    indices = _indices(names, model_names, num_outputs, dict(class_map or {}))
    if not class_map and indices == list(range(num_outputs)):
        return samples, None
    mapped = copy.copy(samples)
    mapped.target_transform = TargetMap(indices)
    mapped.class_names = list(model_names) if model_names is not None else [str(i) for i in range(num_outputs)]
    used = len(set(indices))
    if used == num_outputs:
        note = f"the data's {len(names)} classes are mapped to the model's by name"
    else:
        note = f"the data has {used} of the model's {num_outputs} classes: they are mapped by name"
    if class_map:
        note += f" and class_map ({_listed(f'{a}={b}' for a, b in class_map.items())})"
    return mapped, note


def _indices(
    names: Sequence[str], model_names: Sequence[str] | None, num_outputs: int, class_map: dict[str, str]
) -> list[int]:
    """For each class of the data, the output of the model."""
    known = {_key(name) for name in names}
    if unknown := [name for name in class_map if _key(name) not in known]:
        raise SlimError(f"class_map: the data has no class {_listed(unknown)}{_near(unknown, names)}")
    meant = {_key(name): wanted for name, wanted in class_map.items()}
    if model_names is None:
        return _numbered(names, num_outputs, meant)
    if list(names) == list(model_names) and not class_map:
        return list(range(num_outputs))
    places: dict[str, list[int]] = {}
    for place, name in enumerate(model_names):
        places.setdefault(_key(name), []).append(place)
    if unknown := [wanted for wanted in class_map.values() if _key(wanted) not in places]:
        raise SlimError(f"class_map: the model has no class {_listed(unknown)}{_near(unknown, model_names)}")
    wanted = [meant.get(_key(name), name) for name in names]
    missing = [name for name in wanted if _key(name) not in places]
    if missing:
        raise SlimError(
            f"the data has classes that the model does not have: {_listed(missing)}{_near(missing, model_names)}; "
            f"rename the folders, or say what they are to the model ({parameter('class_map')} {missing[0]}=...)"
        )
    twice = [name for name in wanted if len(places[_key(name)]) > 1]
    if twice:
        raise SlimError(f"the model has several classes called {_listed(twice)}: the data's cannot be told by name")
    return [places[_key(name)][0] for name in wanted]


def _numbered(names: Sequence[str], num_outputs: int, meant: dict[str, str]) -> list[int]:
    """The outputs of a model without class names: those of the class map, or as many as there are classes."""
    if not meant:
        if len(names) != num_outputs:
            raise SlimError(
                f"the data has {len(names)} classes and the model {num_outputs}: they must be the same; the model "
                f"names no classes, so say which output each class is with a class map "
                f"({parameter('class_map')} {names[0]}=0,...)"
            )
        return list(range(num_outputs))
    missing = [name for name in names if _key(name) not in meant]
    if missing:
        raise SlimError(f"class_map: the model names no classes, and the map leaves out {_listed(missing)}")
    wrong = [text for text in meant.values() if not re.fullmatch(r"\d+", text) or int(text) >= num_outputs]
    if wrong:
        raise SlimError(
            f"class_map: the model names no classes: expected the number of an output, 0 to {num_outputs - 1}, "
            f"found {_listed(wrong)}"
        )
    return [int(meant[_key(name)]) for name in names]


def _imagenet_names(names: Sequence[str], num_outputs: int) -> list[str] | None:
    """ImageNet-1k's class names in order, where the data's are some of them and the model has as many outputs."""
    if num_outputs != IMAGENET or not all(re.fullmatch(r"n\d{8}", name) for name in names):
        return None
    from timm.data import ImageNetInfo

    return list(ImageNetInfo("imagenet-1k").label_names())


def read_class_map(text: str) -> dict[str, str]:
    """A class map, data name to model name, from `a=b,c=d` or from a .json, .toml or .csv file.

    JSON and TOML hold one table of names, CSV two columns. Raises `SlimError` where it is none of these, or maps a
    class twice.
    """
    path = Path(text)
    suffix = path.suffix.lower()
    pairs: list[tuple[Any, Any]]
    try:
        if path.is_file() or (suffix in (".json", ".toml", ".csv") and "=" not in text):
            content = path.read_text(encoding="utf-8-sig")
            if suffix == ".json":
                pairs = json.loads(content, object_pairs_hook=list)
            elif suffix == ".toml":
                pairs = list(tomli.loads(content).items())
            elif suffix == ".csv":
                pairs = [(row[0], row[1]) for row in _csv_rows(content)]
            else:
                raise ValueError("expected a .json, .toml or .csv file")
        else:
            pairs = [(data, model) for data, _, model in (part.partition("=") for part in text.split(","))]
            if not all(str(data).strip() and str(model).strip() for data, model in pairs):
                raise ValueError("expected the data's name = the model's name, such as puppy=dog,kitten=cat, or a file")
    except OSError as error:
        raise SlimError(f"class_map: {text}: cannot be read: {error.strerror or error}") from error
    except ValueError as error:
        raise SlimError(f"class_map: {text}: {error}") from error
    return _checked(text, pairs)


def _csv_rows(content: str) -> list[list[str]]:
    rows = [row for row in csv.reader(content.splitlines()) if any(cell.strip() for cell in row)]
    for row in rows:
        if len(row) != 2:
            raise ValueError(f"expected two columns, the data's name and the model's, found {','.join(row)!r}")
    return rows[1:] if rows and [cell.strip().lower() for cell in rows[0]] == ["data", "model"] else rows


def _checked(text: str, pairs: Any) -> dict[str, str]:
    """A map of names to names from what a file held."""
    found: dict[str, str] = {}
    if not isinstance(pairs, list) or not pairs or not all(isinstance(p, tuple) and len(p) == 2 for p in pairs):
        raise SlimError(f"class_map: {text}: expected names of the data's classes with the model's, found none")
    for data, model in pairs:
        if not isinstance(model, (str, int)) or isinstance(model, bool):
            raise SlimError(f"class_map: {text}: {data}: expected the name of a class, found {model!r}")
        name = str(data).strip()
        if found.get(name, str(model).strip()) != str(model).strip():
            raise SlimError(f"class_map: {text}: {name} is mapped twice, to {found[name]} and to {model}")
        found[name] = str(model).strip()
    return found


def _key(name: str) -> str:
    """What names are compared by: macOS writes ü as two characters, Linux as one."""
    return unicodedata.normalize("NFC", name)


def _listed(names: Iterable[str]) -> str:
    """Names for a message, the first few of them."""
    found = list(dict.fromkeys(names))
    more = f" and {len(found) - SAID} more" if len(found) > SAID else ""
    return ", ".join(found[:SAID]) + more


def _nearest(name: str, known: Sequence[str]) -> str | None:
    folded = {other.casefold(): other for other in known}
    near = difflib.get_close_matches(name.casefold(), folded, n=1)
    return folded[near[0]] if near else None


def _near(names: Sequence[str], known: Sequence[str]) -> str:
    """What there is instead of `names`, and what comes near to them."""
    near = [found for found in (_nearest(name, known) for name in names[:SAID]) if found]
    return f" (it has {_listed(known)}{f'; did you mean {_listed(near)}?' if near else ''})"
