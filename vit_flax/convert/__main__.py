"""Converts, describes and verifies checkpoints.

python -m vit_flax.convert IN OUT --to hf              a folder that transformers opens; also timm, npz, vit_flax
python -m vit_flax.convert --describe IN               what IN is; with --time also how fast it loads
python -m vit_flax.convert --parity [--write docs/weights.md]
                                                       runs the installed reference libraries and compares

Exit status: 0 done, 1 a parity case failed, 2 an error with a message.
"""

import argparse
import os
import sys
from collections.abc import Iterator, Sequence
from pathlib import Path

from vit_flax.convert.arguments import json_object, print_no_more, regex, size, whole
from vit_flax.convert.describe import describe, preprocessing, raw_table
from vit_flax.convert.families import FAMILIES, GROUPS
from vit_flax.convert.measure import check_files, measure
from vit_flax.convert.opened import open_checkpoint
from vit_flax.convert.pretrained import Pretrained, load_pretrained
from vit_flax.convert.save import check_target, save_pretrained
from vit_flax.convert.source import open_source
from vit_flax.convert.table import Spec

CHANGES = ("to", "num_classes", "image_size", "patch_size", "channels", "posemb_resize", "fields", "ignore")


def main(argv: Sequence[str] | None = None) -> int:
    """The command; returns its exit status."""
    parser = _parser()
    arguments = parser.parse_args(argv)
    try:
        if arguments.parity:
            from vit_flax.convert.parity import run

            return run.parity(arguments)
        if arguments.describe:
            show(arguments)
        elif arguments.checkpoint and arguments.out and arguments.to:
            convert(arguments)
        else:
            parser.error("give IN OUT --to FORMAT, or --describe IN, or --parity (--help says more)")
    except BrokenPipeError:
        print_no_more()
    except (ValueError, OSError, ModuleNotFoundError) as error:
        if os.environ.get("VIT_FLAX_TRACEBACK"):
            raise
        print(f"error: {error}\n(VIT_FLAX_TRACEBACK=1 shows where.)", file=sys.stderr)
        return 2
    return 0


def convert(arguments: argparse.Namespace) -> None:
    """Loads a checkpoint, prints the report, and writes it in another format."""
    check_target(Path(arguments.out).expanduser(), arguments.to)
    loaded = load_pretrained(
        arguments.checkpoint,
        family=arguments.family,
        num_classes=arguments.num_classes,
        image_size=arguments.image_size,
        ignore=arguments.ignore,
        patch_size=arguments.patch_size,
        channels=arguments.channels,
        posemb_resize=arguments.posemb_resize,
        fields=arguments.fields,
    )
    print(loaded.report)
    path = save_pretrained(
        arguments.out,
        loaded.model,
        loaded.params,
        family=arguments.to,
        class_names=loaded.class_names,
        preprocess=loaded.preprocess,
        image_size=None if loaded.preprocess else loaded.image_size,
        posemb_resize=loaded.report.posemb_resize,
        patch_resize=loaded.report.patch_resize,
        probabilities=loaded.probabilities,
    )
    written = open_checkpoint(path)
    print(f"wrote {path} as {written.family.name}")
    for line in not_kept(loaded, written.spec):
        print(f"  {line}")


def not_kept(loaded: Pretrained, written: Spec) -> Iterator[str]:
    """What goes with the weights and has no place, or another value, in the written format: one line each."""
    if loaded.model.posemb != (posemb := written.fields.get("posemb", "learned")):
        yield f"not kept       that the positions are {loaded.model.posemb}: the same numbers, as posemb={posemb!r}"
    if loaded.class_names and written.class_names != loaded.class_names:
        yield f"not kept       the names of the {len(loaded.class_names)} classes: this format has no place for them"
    if loaded.probabilities != written.probabilities:
        what = f"the probabilities of the classes are the {loaded.probabilities} of the logits"
        what = "the outputs are numbers and no classes" if loaded.probabilities == "none" else what
        yield f"not kept       that {what}"
    ours, theirs = loaded.preprocess, written.preprocess
    if ours and (theirs is None or not ours.same_as(theirs)):
        yield f"not kept       the preprocessing: {preprocessing(ours)}"
        yield f"               it now says:       {preprocessing(theirs)}"


def show(arguments: argparse.Namespace) -> None:
    """Prints what a checkpoint is; where no family wants it, its tensors before the error.

    Raises: ValueError: an argument that only a conversion heeds; --time where no files can be compared.
    """
    if given := [f"--{name}" for name in CHANGES if getattr(arguments, name) not in (None, ())]:
        raise ValueError(
            f"--describe says what a checkpoint is, and changes nothing: leave {', '.join(given)} out, or convert it "
            "and describe what was written."
        )
    if arguments.time:
        check_files(arguments.describe)
    try:
        opened = open_checkpoint(arguments.describe, family=arguments.family)
    except ValueError:
        print(raw_table(open_source(arguments.describe)))
        raise
    print(describe(opened))
    if arguments.time:
        print(measure(arguments.describe, family=arguments.family))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="python -m vit_flax.convert",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", nargs="?", metavar="IN", help="file, folder, workdir or address")
    parser.add_argument("out", nargs="?", metavar="OUT", help="folder to create, or a name that ends in .npz")
    parser.add_argument(
        "--to", choices=[*GROUPS, *FAMILIES], metavar="FORMAT", help=f"{', '.join(GROUPS)}, or a family"
    )
    parser.add_argument("--describe", metavar="IN", help="say what IN is and convert nothing")
    parser.add_argument("--time", action="store_true", help="with --describe: measure loading time and peak memory")
    parser.add_argument("--parity", action="store_true", help="compare with the installed reference libraries")
    change = parser.add_argument_group("changes on the way (as the arguments of load_pretrained)")
    change.add_argument("--family", help=f"one of {', '.join(FAMILIES)}; found from the file unless given")
    change.add_argument("--num_classes", type=whole(0), help="a new head of this size; 0 for none")
    change.add_argument("--image_size", type=size, metavar="N|HxW", help="resample the position table")
    change.add_argument("--patch_size", type=size, metavar="N|HxW", help="resize the patch embedding")
    change.add_argument("--channels", type=whole(1), help="adapt the patch embedding")
    change.add_argument("--posemb_resize", metavar="METHOD", help="instead of the family's own")
    change.add_argument("--fields", type=json_object, metavar="JSON", help="of the model, in place of the file's")
    change.add_argument("--ignore", type=regex, nargs="+", default=(), metavar="REGEX", help="leave out what matches")
    parity = parser.add_argument_group("with --parity")
    parity.add_argument("--image", metavar="FILE", help="a photograph for the full-size cases")
    parity.add_argument("--only", type=regex, metavar="REGEX", help="cases whose 'family name' matches")
    parity.add_argument("--write", metavar="FILE", help="replace the table in this file (docs/weights.md)")
    return parser


if __name__ == "__main__":
    sys.exit(main())
