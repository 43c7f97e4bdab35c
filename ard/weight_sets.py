"""The state dicts in the file of a training script: which there are, and which one is meant.

A training script keeps raw and averaged weights, an optimiser and more in one file, under keys of its own or
in front of the names (`model.blocks.0...`). Averaged weights are what such a model is sampled with: they are
taken where there is one average. Anything that leaves a choice is refused by a line that names the option
which makes it.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

# Keys and prefixes of weights as they are trained: torch's DataParallel and DDP (module), Lightning (model,
# _forward_module), its WeightAveraging (current_model_state), timm (state_dict), BasicSR (params), JiT (net),
# ema_pytorch (online_model), Stable Diffusion (diffusion_model), StyleGAN (g), diffusers (transformer).
_RAW = {
    "model", "state_dict", "model_state_dict", "model_state", "current_model_state", "state", "module",
    "_forward_module", "net", "network", "params", "weights", "online_model", "denoiser", "dit",
    "transformer", "backbone", "diffusion_model", "unwrapped_model", "raw_model", "generator", "g",
}  # fmt: skip
# Words in the keys of averaged weights: ema, model_ema, ema_model, model_ema1, state_dict_ema, params-ema,
# ema_0.9999, EMAModel, shadow_params, swa_model, ..
_AVERAGED = {
    "ema", "emas", "emamodel", "modelema", "shadow", "swa", "lawa", "polyak", "averaged", "average", "avg",
}  # fmt: skip
# Words in the keys of what an optimiser keeps per weight: exp_avg, square_avg, optimizer_state, ..
_OPTIMISERS = {"exp", "square", "opt", "optim", "optimizer", "optimiser", "grad", "grads", "momentum"}
# Either of two may be the average of the other.
_EITHER = {"teacher", "student", "target"}
# What wrappers put into the middle of names when they wrap a part of a model.
_WRAPPERS = {"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module"}
# Numbers that averages keep beside the weights (AveragedModel, LitEma, ema_pytorch).
_BOOKKEEPING = {"n_averaged", "decay", "num_updates", "initted", "step"}
# Weights lie at most about five keys deep (callbacks, a name, state, ..); a file may hold itself.
_DEPTH = 16
# Tables that no training moves; averages of trained parameters alone lack them.
_FIXED_TABLES = ("pos_embed",)

Kind = Literal["averaged", "raw", "either", "other"]


@dataclass(frozen=True)
class WeightSet:
    """One state dict in a file; `parts` lead to it, keys first and then prefixes of names."""

    parts: tuple[str, ...]
    tensors: dict[str, Tensor]
    kind: Kind
    ignored: dict[str, str] = field(default_factory=dict)
    unnamed: bool = False
    """A list of tensors without names, as diffusers' EMAModel keeps."""
    besides: tuple[str, ...] = ()
    """Prefixes that other names of the same state dict have, and these do not."""

    @property
    def key(self) -> str:
        return ".".join(self.parts)


def _words(part: str) -> set[str]:
    return {word.lower() for word in re.findall(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+", part)}


def _kind(parts: Sequence[str]) -> Kind:
    words = [_words(part) for part in parts]
    if "online_model" in parts:  # ema_pytorch keeps it inside of the average
        return "raw"
    if any(found & _AVERAGED and not found & _OPTIMISERS for found in words):
        return "averaged"
    if any(found & _EITHER for found in words):
        return "either"
    return "raw" if all(part.lower() in _RAW for part in parts) else "other"


def _is_prefix(part: str) -> bool:
    return _kind((part,)) != "other"


def items(content: object) -> list[tuple[str, Any]]:
    """What a container holds, by keys as text."""
    if isinstance(content, dict):
        # Not content.items(): a file can give an OrderedDict an attribute of that name.
        return [(str(key), value) for key, value in dict.items(content)]
    return [(str(i), value) for i, value in enumerate(content)] if isinstance(content, (list, tuple)) else []


def _found(content: object, parts: tuple[str, ...] = ()) -> list[WeightSet]:
    """All mappings of names to tensors in a file, and all averages that have no names."""
    kind = _kind(parts)
    held = items(content) if len(parts) <= _DEPTH else []
    below = [weights for key, value in held for weights in _found(value, (*parts, key))]
    tensors = {key: value for key, value in held if isinstance(value, Tensor)}
    if isinstance(content, (list, tuple)):
        unnamed = bool(tensors) and kind == "averaged"
        return [*below, WeightSet(parts, tensors, kind, unnamed=True)] if unnamed else below
    # Beside other weights a tensor whose name has no dot is no weight: a step, the state of a generator.
    own = tensors if not below else {name: tensor for name, tensor in tensors.items() if "." in name}
    return [*below, WeightSet(parts, own, kind)] if own else below


def _averages_told(sets: list[WeightSet]) -> list[WeightSet]:
    """Lightning's WeightAveraging moves the raw weights aside and puts its average under state_dict."""
    if not any(weights.parts[:1] == ("current_model_state",) for weights in sets):
        return sets
    return [replace(w, kind="averaged") if w.parts[:1] == ("state_dict",) else w for w in sets]


def _unwrapped(weights: WeightSet, source: Path) -> WeightSet:
    """Names without what wrappers put into them, and without an average's own numbers."""
    tensors: dict[str, Tensor] = {}
    before: dict[str, str] = {}
    for name, tensor in weights.tensors.items():
        parts = [part for part in name.split(".") if part not in _WRAPPERS]
        short = ".".join(parts)
        if short in tensors:
            raise ValueError(f"{source}: {before[short]} and {name} are both {short} without the wrappers' "
                             "prefixes; accepted is one of them")  # fmt: skip
        tensors[short], before[short] = tensor, name
    average = weights.kind == "averaged" or not tensors.keys().isdisjoint(("n_averaged", "initted"))
    if average:
        tensors = {n: t for n, t in tensors.items() if n not in _BOOKKEEPING or t.numel() > 1}
    return replace(weights, tensors=tensors)


def without(weights: WeightSet, ignore: Sequence[str]) -> WeightSet:
    """Leave out what the patterns fit, noted by its name without prefixes, too."""
    kept, ignored = {}, dict(weights.ignored)
    for name, tensor in weights.tensors.items():
        pattern = next((p for p in ignore if fnmatchcase(name, p)), None)
        if pattern is None:
            kept[name] = tensor
            continue
        ignored[name] = pattern
        while _is_prefix(name.partition(".")[0]) and "." in name:
            name = name.partition(".")[2]
            ignored[name] = pattern
    return replace(weights, tensors=kept, ignored=ignored)


def _parted(weights: WeightSet, ignore: Sequence[str], source: Path) -> list[WeightSet]:
    """The state dicts that one of a wrapper consists of, by the prefixes of its names."""
    if weights.unnamed:
        return [weights]
    weights = without(_unwrapped(weights, source), ignore)
    groups: dict[str, dict[str, Tensor]] = {}
    rest = {}
    for name, tensor in weights.tensors.items():
        first, dot, short = name.partition(".")
        if dot and _is_prefix(first):
            groups.setdefault(first, {})[short] = tensor
        else:
            rest[name] = tensor
    parted = []
    for first, tensors in groups.items():
        parts = (*weights.parts, first)
        # An average that only the whole file shows (WeightAveraging) stays one below its prefixes.
        kind = weights.kind if weights.kind != _kind(weights.parts) else _kind(parts)
        parted += _parted(replace(weights, parts=parts, tensors=tensors, kind=kind), ignore, source)
    if rest or not groups:
        besides = tuple(".".join((*weights.parts, first)) for first in groups)
        parted.append(replace(weights, tensors=rest, besides=besides))
    return parted


def _dotted(average: WeightSet, sets: Iterable[WeightSet], source: Path) -> WeightSet:
    """LitEma (Stable Diffusion) takes the dots out of names: put them back, by the raw weights' names."""
    names = {name.replace("_orig_mod", ""): name for name in average.tensors}
    if average.unnamed or len(names) < 2 or any("." in name for name in names):
        return average
    for raw in (weights for weights in sets if weights.kind == "raw"):
        for i in range(len(raw.parts) + 1):  # LitEma began to count names at any of the raw weights' parents
            above = "".join(raw.parts[i:])
            flat: dict[str, str] = {}
            for name in raw.tensors:
                short = above + name.replace(".", "")
                if short in names and short in flat:
                    raise ValueError(f"{source}: {average.key} names {short}, which is {flat[short]} or "
                                     f"{name} without dots; accepted are names that tell")  # fmt: skip
                flat[short] = name
            if names.keys() <= flat.keys():
                tensors = {flat[short]: average.tensors[name] for short, name in names.items()}
                return replace(average, tensors=tensors)
    return average


def _completed(average: WeightSet, sets: Iterable[WeightSet]) -> tuple[WeightSet, list[str]]:
    """An average with the fixed tables that only the raw weights hold, and lines that say so."""
    tensors, notes = dict(average.tensors), []
    raw = [weights for weights in sets if weights.kind == "raw"]
    for table in _FIXED_TABLES:
        if table not in tensors and len(raw) == 1 and table in raw[0].tensors:
            tensors[table] = raw[0].tensors[table]
            notes.append(f"weights: {table}, which is never trained, from {raw[0].key}")
    return replace(average, tensors=tensors), notes


def _listed(sets: Iterable[WeightSet]) -> str:
    # The model is among the largest; an optimiser that keeps its state by name has hundreds of mappings.
    largest = sorted({weights.key: len(weights.tensors) for weights in sets}.items(), key=lambda x: -x[1])[:8]
    return ", ".join(key or "(no key)" for key, _ in largest)


def _asked(sets: Sequence[WeightSet], key: str, source: Path) -> list[WeightSet]:
    """The state dict of a key, or those below it, or the names that begin with it."""
    if exact := [weights for weights in sets if weights.key == key]:
        return [replace(weights, besides=()) for weights in exact]
    if below := [weights for weights in sets if weights.key.startswith(f"{key}.")]:
        return below
    for weights in sets:
        if weights.key and not key.startswith(f"{weights.key}."):
            continue
        prefix = key.removeprefix(f"{weights.key}.") + "."
        if chosen := {n.removeprefix(prefix): t for n, t in weights.tensors.items() if n.startswith(prefix)}:
            return [replace(weights, parts=(key,), tensors=chosen, besides=())]
    raise ValueError(f"{source}: --weights-key is {key!r}, the file has {_listed(sets)}")


def _rivals(raw: WeightSet, sets: Iterable[WeightSet]) -> list[WeightSet]:
    """State dicts under unknown keys with the same names: any of them may be an average."""
    trained = raw.tensors.keys() - set(_FIXED_TABLES)
    return [
        other for other in sets
        if other.kind == "other" and trained and trained <= other.tensors.keys()
        and not any(_words(part) & _OPTIMISERS for part in other.parts)
    ]  # fmt: skip


def _chosen(sets: list[WeightSet], key: str | None, source: Path) -> WeightSet:
    """The one that is meant; ValueError that names --weights-key where that is not clear."""
    asked = sets if key is None else _asked(sets, key, source)
    pool = [weights for weights in asked if weights.kind != "other"] or (asked if key is not None else [])
    averages = [weights for weights in pool if weights.kind == "averaged"]
    named = [weights.key for weights in pool if weights.key and not weights.unnamed]
    raw = " or ".join(f"--weights-key {key}" for key in named)
    if len(averages) == 1 and averages[0].unnamed:
        raise ValueError(
            f"{source}: its averaged weights, {averages[0].key}, are a list without names; accepted is a "
            "mapping of names to tensors: load them into the model where they were made (ema.copy_to) and "
            f"torch.save(model.state_dict(), FILE){f'; {raw} takes what was not averaged' if raw else ''}"
        )
    for weights in pool:
        if weights.besides:
            others = sorted(
                {name.partition(".")[0] + (".*" if "." in name else "") for name in weights.tensors}
            )
            raise ValueError(
                f"{source}: some of its names are under {', '.join(weights.besides)}, and others are not "
                f"({', '.join(others[:8])}{', ..' * (len(others) > 8)}): "
                f"{' or '.join(f'--weights-key {k}' for k in weights.besides)} takes what is there, --ignore "
                f"{' '.join(repr(name) for name in others[:8])} leaves the others out"
            )
    if len(averages) == 1:
        return averages[0]
    if len(pool) == 1 and (key is not None or not (rivals := _rivals(pool[0], sets))):
        return pool[0]
    pool += rivals if len(pool) == 1 else []
    if not pool and len(sets) == 0:
        raise ValueError(f"{source}: accepted is a mapping of names to tensors")
    if not pool:
        raise ValueError(f"{source}: its tensors lie under {_listed(sets)}; say with --weights-key KEY which "
                         "are the weights")  # fmt: skip
    what = "several averages of its weights" if averages else "several state dicts"
    keys = [weights.key for weights in averages or pool if not weights.unnamed]
    ways = " or ".join(f"--weights-key {key}" for key in keys)
    raise ValueError(f"{source}: holds {what} ({_listed(averages or pool)}); say which: {ways}")


def choose(sets: list[WeightSet], key: str | None, source: Path) -> tuple[WeightSet, list[str]]:
    """The state dict that is meant, whole and by the model's names, and lines about the choices made.

    Args:
        sets: of `weight_sets`.
        key: of the one that the user wants; None: the only average, else the only one.
        source: named in errors.

    Raises:
        ValueError: the choice is the user's; the message names --weights-key and the keys.
    """
    chosen, notes = _chosen(sets, key, source), []
    keys = [weights.key for weights in sets if weights.kind != "other"]
    if others := [other for other in keys if other not in ("", chosen.key)]:
        how = "averaged; " if chosen.kind == "averaged" else ""
        notes.append(f"weights: {chosen.key} ({how}also in the file: {', '.join(others)})")
    if chosen.kind == "averaged":
        chosen, completed = _completed(_dotted(chosen, sets, source), sets)
        notes += completed
    return chosen, notes


def weight_sets(content: object, ignore: Sequence[str], source: Path) -> list[WeightSet]:
    """All state dicts in what a file holds, without wrappers' prefixes and the names that `ignore` fits.

    Raises:
        ValueError: two names that are one without prefixes.
    """
    if isinstance(content, dict) and not content:
        return [WeightSet((), {}, "raw")]  # everything is missing, and will be listed
    found = _averages_told(_found(content))
    sets = [part for weights in found for part in _parted(weights, ignore, source)]
    # Means of losses under the name of an average are no average of weights.
    return [w for w in sets if w.kind != "averaged" or any(t.numel() > 1 for t in w.tensors.values())]
