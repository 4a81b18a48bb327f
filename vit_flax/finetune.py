"""Starting a run from a checkpoint: the `init` section of a config.

    config.init = dict(path="vit_small.safetensors")        # anything that `load_pretrained` opens
    config.model = dict(drop_path=0.1)                      # the rest of the model is the checkpoint's

What the config does not say, the checkpoint says: the fields of the model, mean and standard deviation of the pixels,
the filter of every resize. What both say has to agree, or the config has to say which of them counts. `Start` fills the
config in before anything is built, so that the config.json of the run is complete, and loads the weights only if the
run has no checkpoint of its own.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, fields
from typing import Any

import jax.numpy as jnp
import numpy as np
from flax.traverse_util import flatten_dict, unflatten_dict

from vit_flax.config import ConfigError
from vit_flax.convert.describe import digest
from vit_flax.convert.opened import Opened, open_checkpoint
from vit_flax.convert.preprocess import Preprocess
from vit_flax.convert.pretrained import load_opened
from vit_flax.convert.report import Report
from vit_flax.convert.save import architecture
from vit_flax.data.transforms import TRANSFORMS
from vit_flax.models import ViT, make_model
from vit_flax.models.layout import unstack_blocks
from vit_flax.models.variants import parse

PREPROCESS = ("agree", "checkpoint", "config")
HEAD = ("num_classes", "representation_size")
RESIZE = ("filter", "antialias")
CLASS_NAMES = "class_names"  # the one entry of `override` that is no field of the model


@dataclass(frozen=True)
class Init:
    """The `init` section.

    Attributes:
      path: of the checkpoint: file, folder, workdir of another run, or address.
      family: as in `load_pretrained`.
      keep_head: whether the classes are those of the checkpoint; otherwise the head starts anew.
      override: fields of the model in which the config counts, not the checkpoint, such as ("pool", "norm_after_pool");
        with `keep_head`, "class_names" says that the data has the checkpoint's classes under other names.
      preprocess: which mean, standard deviation and filter count where config and checkpoint differ: "checkpoint",
        "config", or "agree" (differences are an error).
      posemb_resize: how the position table is resampled; None for the way of the checkpoint's family.
      ignore: as in `load_pretrained`.
      patch_resize: how the checkpoint's family resizes the patch embedding; filled in, for who starts from this run.
      weights: digest of the checkpoint; filled in, together with everything that the config left to the checkpoint. A
        config that has it is complete, and its checkpoint is opened only to load the weights.
    """

    path: str
    family: str | None = None
    keep_head: bool = False
    override: Sequence[str] = ()
    preprocess: str = "agree"
    posemb_resize: str | None = None
    ignore: Sequence[str] = ()
    patch_resize: str | None = None
    weights: str | None = None

    def __post_init__(self) -> None:
        if not self.path:
            raise ValueError("path is empty: name a checkpoint, such as --config.init.path=vit_small.safetensors.")
        if self.preprocess not in PREPROCESS:
            raise ValueError(f"preprocess={self.preprocess!r} is unknown: expected one of {', '.join(PREPROCESS)}.")
        known = [CLASS_NAMES, *(f.name for f in fields(ViT))]
        if unknown := [name for name in self.override if name not in known or name in HEAD]:
            raise ValueError(f"override={unknown}: no fields of the model that a checkpoint fixes.")


class Start:
    """Where the parameters of a run start: from a checkpoint.

    Args:
      section: the `init` section.
    """

    def __init__(self, section: Mapping[str, Any]):
        self.init = Init(**section)
        self._opened: Opened | None = None

    @property
    def opened(self) -> Opened:
        """The checkpoint; opened, and fetched where it is remote, when first asked for."""
        if self._opened is None:
            self._opened = open_checkpoint(self.init.path, family=self.init.family)
        return self._opened

    def complete_data(self, config: dict[str, Any]) -> dict[str, Any]:
        """The config with the checkpoint's filter in every operation that resizes.

        Raises: ConfigError: the filters differ.
        """
        theirs = self._resize() if self.init.weights is None and self.init.preprocess != "config" else None
        if theirs is None:
            return config
        data = dict(config["data"])
        for split in ("train_transforms", "eval_transforms"):
            data[split] = [self._with_filter(f"data.{split}", dict(op), theirs) for op in data.get(split, ())]
        return {**config, "data": data}

    def _resize(self) -> dict[str, Any] | None:
        """Filter and antialias of the checkpoint's pictures; of a run, those of the first resize of its evaluation."""
        spec = self.opened.spec
        if spec.preprocess is not None:
            return {name: getattr(spec.preprocess, name) for name in RESIZE}
        for op in () if spec.evaluation is None else spec.evaluation.transforms:
            if _resizes(op):
                return {f.name: op.get(f.name, f.default) for f in fields(TRANSFORMS[op["op"]]) if f.name in RESIZE}
        return None

    def _with_filter(self, where: str, op: dict[str, Any], theirs: dict[str, Any]) -> dict[str, Any]:
        if not _resizes(op):
            return op
        if self.init.preprocess == "agree":
            for key in theirs.keys() & op.keys():
                if op[key] != theirs[key]:
                    raise self._differ(f"{key} of {op['op']!r} in {where}", op[key], theirs[key])
        return {**op, **theirs}

    def complete_model(
        self, config: dict[str, Any], class_names: Sequence[str], image_shape: Sequence[int]
    ) -> dict[str, Any]:
        """The config with everything else that it leaves to the checkpoint.

        Args:
          config: as given, its data section completed.
          class_names: of the data.
          image_shape: height, width and channels of the images in a batch.

        Raises: ConfigError: config and checkpoint differ; names the fields and what to write.
        """
        if self.init.weights is not None:
            return config
        if self.init.keep_head:
            self._check_classes(class_names)
        section = {"num_classes": len(class_names), **config["model"]}
        init = {
            **config["init"],
            "posemb_resize": self.init.posemb_resize or self.opened.spec.posemb_resize,
            "patch_resize": self.opened.spec.patch_resize,
            "weights": digest(self.opened.source),
        }
        augment = self._with_mean_and_std(dict(config["augment"]), image_shape[-1])
        return {**config, "init": init, "augment": augment, "model": self._with_fields(section)}

    def _check_classes(self, ours: Sequence[str]) -> None:
        """With the head come its classes: the data must have the same, in the same order."""
        path, found, theirs = self.init.path, self.opened.model.num_classes, self.opened.spec.class_names
        anew = "Leave init.keep_head out to start with a new head"
        if found != len(ours):
            raise ConfigError(
                f"init.keep_head=True, but the head of {path} has {_classes(found, theirs)}, and the data "
                f"{_classes(len(ours), ours)}. {anew}, or take data with the checkpoint's classes, all of them."
            )
        if theirs is None or CLASS_NAMES in self.init.override or _only_numbers(ours) or _only_numbers(theirs):
            return
        if differ := [i for i in range(len(ours)) if ours[i] != theirs[i]]:
            first = "\n".join(
                f"  class {i}: the data says {ours[i]!r}, the checkpoint {theirs[i]!r}" for i in differ[:5]
            )
            raise ConfigError(
                f"init.keep_head=True, but {len(differ)} of the {found} classes of {path} are others than the data's, "
                f"or in another order:\n{first}\n{anew}, or give the data the checkpoint's classes in the checkpoint's "
                "order. If they are the same classes under other names: init.override=('class_names',)"
            )

    def _with_fields(self, section: dict[str, Any]) -> dict[str, Any]:
        theirs = architecture(self.opened.model)
        left_to_config = {*self.init.override, *(() if self.init.keep_head else HEAD)}
        stored = {name: getattr(self.opened.model, name) for name in theirs if name not in left_to_config}
        given = {**(parse(section["variant"]) if section.get("variant") else {}), **section}
        full = {**stored, **{name: value for name, value in given.items() if name != "variant"}}
        ours = architecture(make_model(**full))
        wrong = [name for name in stored if name in given and ours[name] != theirs[name]]
        if wrong:
            lines = [f"  model.{n}: the config says {ours[n]!r}, the checkpoint {theirs[n]!r}" for n in wrong]
            right = ", ".join(f"{name}={stored[name]!r}" for name in wrong)
            all_the_same = f" To load the weights into the config's model all the same: init.override={wrong}"
            raise ConfigError(
                f"The model of the config is not that of {self.init.path}:\n"
                + "\n".join(lines)
                + f"\nWrite {right} into the model section, or leave these fields out of it: the checkpoint fills them "
                + f"in.{'' if set(wrong) & set(HEAD) else all_the_same}"
            )
        if ours["pool"] == "none":
            raise ConfigError(
                f"The model of {self.init.path} gives every token by itself, and there is one target per picture. "
                "Choose a pooling: config.model.pool='gap' and init.override=('pool',)."
            )
        return full

    def _with_mean_and_std(self, augment: dict[str, Any], channels: int) -> dict[str, Any]:
        known = self.opened.spec.preprocess or self.opened.spec.evaluation
        if known is None and (self.init.preprocess == "checkpoint" or not {"mean", "std"} <= augment.keys()):
            raise ConfigError(
                f"{self.init.path} does not say how its pictures were prepared: write augment.mean and augment.std, "
                "and init.preprocess='config'."
            )
        if known is None or self.init.preprocess == "config":
            return augment
        theirs = Preprocess(known.image_size, known.mean, known.std).with_channels(channels)
        for name, value in (("mean", theirs.mean), ("std", theirs.std)):
            if name in augment and self.init.preprocess == "agree":
                if not np.allclose(augment[name], value, atol=1e-3):
                    raise self._differ(f"augment.{name}", augment[name], value)
            else:
                augment[name] = tuple(value)
        return augment

    def _differ(self, what: str, ours: Any, theirs: Any) -> ConfigError:
        return ConfigError(
            f"{what} is {ours!r}, but the pictures of {self.init.path} went through {theirs!r}. Leave it out of the "
            "config to take the checkpoint's, or choose with init.preprocess='checkpoint' or 'config'."
        )

    def load(self, model: ViT, class_names: Sequence[str], image_shape: Sequence[int]) -> tuple[dict[str, Any], Report]:
        """The parameters that come from the checkpoint, by path, and the account of all of them.

        Args:
          model: of the run.
          class_names: of the data.
          image_shape: height, width and channels of the images in a batch.

        Raises:
          ConfigError: another checkpoint lies at the path than the one that the run was set up with, or the kept head
            is for other classes.
          ValueError: as of `load_pretrained`.
        """
        if self.init.weights not in (None, digest(self.opened.source)):
            raise ConfigError(
                f"init.path={self.init.path!r} is another checkpoint than the one this run was set up with."
            )
        if self.init.keep_head:  # a complete config may have been given other data
            self._check_classes(class_names)
        special = ("patch_size", CLASS_NAMES)
        changed = {name: getattr(model, name) for name in self.init.override if name not in special}
        opened = open_checkpoint(self.init.path, family=self.init.family, fields=changed) if changed else self.opened
        loaded = load_opened(
            opened,
            num_classes=model.num_classes,
            new_head=not self.init.keep_head,
            image_size=(image_shape[0], image_shape[1]),
            channels=image_shape[2],
            patch_size=model.patch_size if "patch_size" in self.init.override else None,
            posemb_resize=self.init.posemb_resize,
            ignore=self.init.ignore,
        )
        flat: Any = flatten_dict(loaded.params, sep="/")
        stored = {*loaded.report.loaded, *opened.spec.constants}
        params: Any = unflatten_dict({path: value for path, value in flat.items() if path in stored}, sep="/")
        params = params if model.scan else unstack_blocks(params)
        return flatten_dict(params, sep="/"), loaded.report


def _resizes(op: Mapping[str, Any]) -> bool:
    """Whether an operation resizes; policies have filters, too, for what they turn and shear."""
    known = TRANSFORMS.get(op.get("op", ""))
    return known is not None and {f.name for f in fields(known)}.issuperset(RESIZE)


def _only_numbers(names: Sequence[str]) -> bool:
    return list(names) == [str(i) for i in range(len(names))]


def _classes(number: int | None, names: Sequence[str] | None) -> str:
    some = f" ({', '.join(names[:5])}{', ...' if len(names) > 5 else ''})" if names else ""
    return f"{number or 'no'} classes{some}"


def put_in(params: Any, pretrained: Mapping[str, Any]) -> Any:
    """The parameters with those in the place of some of them that `load` gave, in the parameters' own types.

    Raises: ValueError: there is no parameter of that name and shape.
    """
    flat: dict[str, Any] = dict(flatten_dict(params, sep="/"))
    for path, value in pretrained.items():
        if path not in flat or flat[path].shape != value.shape:
            found = flat[path].shape if path in flat else "no such parameter"
            raise ValueError(f"The checkpoint gives {path} {value.shape}, and the model of the run has {found}.")
        flat[path] = jnp.asarray(value, flat[path].dtype)
    return unflatten_dict(flat, sep="/")


class FromScratch:
    """Where the parameters of a run start without an `init` section: from the model's own initialisers."""

    def complete_data(self, config: dict[str, Any]) -> dict[str, Any]:
        """As it is."""
        return config

    def complete_model(
        self, config: dict[str, Any], class_names: Sequence[str], image_shape: Sequence[int]
    ) -> dict[str, Any]:
        """As it is."""
        return config

    def load(self, model: ViT, class_names: Sequence[str], image_shape: Sequence[int]) -> tuple[dict[str, Any], None]:
        """Nothing."""
        return {}, None
