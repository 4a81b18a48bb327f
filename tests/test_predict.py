"""Classes of pictures, from the command line: the same numbers as the evaluation of the run gives."""

import csv
import dataclasses
import json
from pathlib import Path

import jax
import jaxtyping
import numpy as np
import pytest
from PIL import Image

from tests.helpers import tiny_config
from vit_flax import ViT, checkpoint, load_pretrained, predict, save_pretrained
from vit_flax.augment import normalize
from vit_flax.config import ConfigError
from vit_flax.convert import __main__ as command
from vit_flax.convert.opened import open_checkpoint
from vit_flax.convert.workdir import evaluation_of, preprocess_of
from vit_flax.data.digits import read_digits
from vit_flax.data.transforms import make_transform
from vit_flax.job import build
from vit_flax.picture_folders import SUFFIXES
from vit_flax.trainer import train


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run on the digits, its config, its final state, and a folder of digits as files."""
    folder = tmp_path_factory.mktemp("predict")
    config = tiny_config(run__total_steps=10, optim__lr=1e-2)
    state, _ = train(config, folder / "run")
    (folder / "pictures" / "deep").mkdir(parents=True)
    for i, pixels in enumerate(read_digits()[0][:5]):
        Image.fromarray(pixels).save(folder / "pictures" / ("deep" if i % 2 else ".") / f"{i}.png")
    return folder, config, state


def lines(capsys):
    return [json.loads(line) for line in capsys.readouterr().out.splitlines()]


def test_probabilities_are_those_of_the_run(run, capsys):
    folder, config, state = run
    arguments = ["--checkpoint", str(folder / "run"), str(folder / "pictures"), "--json", "--batch_size", "2"]
    assert predict.main([*arguments, "--top", "10"]) == 0
    found = lines(capsys)
    pictures = folder / "pictures"
    order = [
        pictures / "0.png",
        pictures / "2.png",
        pictures / "4.png",
        pictures / "deep/1.png",
        pictures / "deep/3.png",
    ]
    assert [row["image"] for row in found] == list(map(str, order))

    def probabilities(params, images):
        images = normalize(images, mean=(0.5,), std=(0.5,))
        return jax.nn.softmax(build(config).model.apply({"params": params}, images, train=False)[0])

    images = np.stack([np.asarray(Image.open(path))[:, :, None] for path in order])
    expected = np.asarray(jax.jit(probabilities)(state.params, jax.numpy.asarray(images)))
    for row, theirs in zip(found, expected, strict=True):
        ours = np.zeros(10)
        for best in row["top"]:
            ours[best["index"]] = best["probability"]
            assert best["class"] == str(best["index"])
        np.testing.assert_allclose(ours, theirs, atol=1e-6)
        assert [best["probability"] for best in row["top"]] == sorted(ours, reverse=True)


def test_table(run, capsys):
    folder, _, _ = run
    arguments = ["--checkpoint", str(folder / "run"), str(folder / "pictures" / "deep"), "--top", "2"]
    assert predict.main([*arguments, "--json"]) == 0
    expected = lines(capsys)
    assert predict.main([*arguments, "--csv"]) == 0
    table = list(csv.DictReader(capsys.readouterr().out.splitlines()))
    assert [row["image"] for row in table] == [row["image"] for row in expected]
    for row, same in zip(table, expected):
        assert [row["class_1"], row["class_2"]] == [best["class"] for best in same["top"]]
        assert abs(float(row["probability_2"]) - same["top"][1]["probability"]) < 1e-6


def test_each_class_has_its_own_probability_where_the_loss_says_so(run, capsys, tmp_path, monkeypatch):
    """The value goes from the run through our own format to what is printed; a new head starts without it."""
    folder, _, _ = run
    load_params = checkpoint.load_params

    def with_sigmoid_loss(*args, **kwargs):
        saved = load_params(*args, **kwargs)
        return dataclasses.replace(saved, config=saved.config | {"loss": {"name": "sigmoid_xent"}})

    picture = folder / "pictures" / "0.png"
    softmax = load_pretrained(folder / "run")
    monkeypatch.setattr(checkpoint, "load_params", with_sigmoid_loss)
    assert command.main([str(folder / "run"), str(tmp_path / "own"), "--to", "vit_flax"]) == 0
    monkeypatch.undo()
    own = load_pretrained(tmp_path / "own")
    assert (softmax.probabilities, own.probabilities) == ("softmax", "sigmoid")
    assert load_pretrained(tmp_path / "own", num_classes=3).probabilities == "softmax"
    [(_, likely)], [(_, certain)] = (list(predict.predict(p, [picture], top=10)) for p in (own, softmax))
    logits = [np.log(best["probability"] / (1 - best["probability"])) for best in likely]
    expected = np.exp(logits) / np.exp(logits).sum()
    np.testing.assert_allclose([best["probability"] for best in certain], expected, rtol=1e-4)
    capsys.readouterr()
    assert command.main(["--describe", str(tmp_path / "own")]) == 0
    assert "; each has a probability of its own" in capsys.readouterr().out
    silent = dataclasses.replace(open_checkpoint(tmp_path / "own").spec, probabilities="softmax")
    assert "that the probabilities of the classes are the sigmoid" in "".join(command.not_kept(own, silent))


def test_folders_give_the_pictures_that_training_takes(tmp_path, monkeypatch, caplog):
    for name in ("b.JPG", "a.png", "folder.jpg/deep.webp", ".hidden.jpg", "._a.png", ".cache/c.jpg", "notes.txt"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        (tmp_path / name).write_bytes(b"")
    expected = [tmp_path / name for name in ("a.png", "b.JPG", "folder.jpg/deep.webp")]
    monkeypatch.setenv("HOME", str(tmp_path.parent))
    assert predict.find_pictures([str(tmp_path)]) == predict.find_pictures([f"~/{tmp_path.name}"]) == expected
    assert predict.find_pictures([f"~/{tmp_path.name}/a.png"]) == expected[:1]
    messages = [record.getMessage() for record in caplog.records]
    assert len(messages) == 2  # of each call with the folder
    assert messages[0].endswith(f"left out 1 that are not {', '.join(SUFFIXES)}, such as {tmp_path / 'notes.txt'}")


def test_what_cannot_be_read_is_said_and_the_rest_is_classified(run, capsys, tmp_path):
    folder, _, _ = run
    bad = tmp_path / "bad.png"
    bad.write_bytes(b"no picture")
    good = folder / "pictures" / "0.png"
    code = predict.main(["--checkpoint", str(folder / "run"), str(bad), str(good), "--top", "2"])
    printed = capsys.readouterr()
    assert code == 1
    assert f"cannot decode '{bad}': not an image" in printed.err
    assert printed.out.startswith(f"{good}  0.")
    assert len(printed.out.splitlines()) == 1


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--checkpoint", "nowhere", "README.md"], "nowhere: there is no such file or folder"),
        (["--checkpoint", "tests/golden/vit_jax_prelinen.ckpt.npz", "nowhere.jpg"], "nowhere.jpg: there is no such"),
        (["--checkpoint", "tests/golden/vit_jax_prelinen.ckpt.npz", "docs"], "docs: the folder holds no picture"),
        (["--checkpoint", "tests/golden/big_vision_map_siglip.ckpt.npz", "README.md"], "has no head"),
        (
            ["--checkpoint", "tests/golden/timm_ours_to_timm_every_token_by_itself", "README.md"],
            "every token by itself",
        ),
        (["--checkpoint", "tests/golden/hf_CLIPModel", "README.md"], "its head projects into the space of CLIP's text"),
        (["--checkpoint", "hf://a/b/c", "README.md"], "hf://a/b/c: "),
        (["--checkpoint", "nowhere", "README.md", "--preprocess", "{"], "--preprocess {: "),  # before anything is read
    ],
)
def test_mistakes_end_with_a_message(arguments, message, capsys, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "huggingface_hub", None)
    assert predict.main(arguments) == 2
    assert message in capsys.readouterr().err


@pytest.mark.parametrize(
    ("num_classes", "probabilities", "found"),
    [(1, "softmax", "one output, a number"), (3, "none", "outputs that are numbers")],
)
def test_numbers_are_no_classes(num_classes, probabilities, found):
    pretrained = load_pretrained("tests/golden/vit_jax_prelinen.ckpt.npz")
    model = pretrained.model.clone(num_classes=num_classes)
    regression = dataclasses.replace(pretrained, model=model, probabilities=probabilities)
    with pytest.raises(ValueError, match=rf"prelinen.* has {found} and not classes"):
        next(predict.predict(regression, [Path("README.md")]))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--top", "0"], "argument --top: expected a whole number of 1 or more, found '0'"),
        (["--batch_size", "many"], "argument --batch_size: expected a whole number of 1 or more, found 'many'"),
        (["--image_size", "24x"], None),
        (["--image_size", "big"], "argument --image_size: expected a size such as 224 or 224x384, found 'big'"),
    ],
)
def test_numbers_on_the_command_line(arguments, message, capsys):
    if message is None:
        assert predict._parser().parse_args(["--checkpoint", "a", "b", *arguments]).image_size == (24, 24)
        return
    with pytest.raises(SystemExit, match="2"):
        predict.main(["--checkpoint", "a", "b", *arguments])
    assert message in capsys.readouterr().err


def test_preparation_that_the_checkpoint_does_not_know_can_be_given(run, capsys, tmp_path):
    folder, _, _ = run
    loaded = load_pretrained(folder / "run")
    save_pretrained(tmp_path / "bare", loaded.model, loaded.params, family="vit_flax")
    arguments = ["--checkpoint", str(tmp_path / "bare"), str(folder / "pictures" / "0.png"), "--json"]
    assert predict.main(arguments) == 2
    assert '--preprocess \'{"image_size"' in capsys.readouterr().err
    same = json.dumps(dataclasses.asdict(loaded.preprocess))
    assert predict.main([*arguments, "--preprocess", same]) == 0
    bare = lines(capsys)
    assert predict.main(["--checkpoint", str(folder / "run"), *arguments[2:]]) == 0
    assert bare[0]["top"] == lines(capsys)[0]["top"]
    assert predict.main([*arguments, "--preprocess", '{"size": 3}']) == 2
    assert '--preprocess {"size": 3}: ' in capsys.readouterr().err


@pytest.fixture(scope="module")
def photographs(tmp_path_factory):
    """Two classes of pictures, one of which a camera stored on its side."""
    root = tmp_path_factory.mktemp("photographs")
    rng = np.random.default_rng(0)
    for name in ("cat", "dog"):
        (root / name).mkdir()
        for i in range(40):
            coarse = Image.fromarray(rng.integers(0, 256, (8, 12, 3), dtype=np.uint8))
            exif = Image.Exif()
            exif[0x0112] = 6 if i % 2 else 1
            coarse.resize((72, 48), Image.Resampling.BICUBIC).save(root / name / f"{i}.jpg", exif=exif)
    return root


def photograph_config(root, eval_transforms):
    config = tiny_config(run__total_steps=2, model__num_classes=2, model__patch_size=8)
    folder = dict(name="folder", root=str(root))
    config.data.update(dict(source=folder, train_split="train", eval_split="val", batch_size=8))
    config.data.update(dict(train_transforms=[dict(op="resize", size_px=32)], eval_transforms=eval_transforms))
    config.augment = dict(mean=(0.4, 0.5, 0.6), std=(0.2,))
    return config


EVALUATIONS = [
    [dict(op="resize", size_px=32)],
    [dict(op="decode", apply_exif=False), dict(op="resize", size_px=(32, 48))],
    [dict(op="resize", size_px=64)],
    [dict(op="resize_small", size_px=73), dict(op="central_crop", size_px=64)],
    [dict(op="resize_small", size_px=48, filter="lanczos"), dict(op="central_crop", size_px=(32, 40))],
    [dict(op="resize", size_px=40, filter="bicubic"), dict(op="central_crop", size_px=32)],
    [dict(op="central_crop", size_px=32)],
]


@pytest.mark.parametrize("eval_transforms", EVALUATIONS, ids=str)
def test_pictures_are_prepared_as_the_evaluation_batch_of_the_run(photographs, eval_transforms):
    job = build(photograph_config(photographs, eval_transforms))
    batch = next(iter(job.data.eval()))
    expected = np.asarray(normalize(jax.numpy.asarray(batch["image"]), mean=(0.4, 0.5, 0.6), std=(0.2,)))
    prepare = predict.as_evaluated(evaluation_of(job.about()["preprocessing"]), "run")
    assert prepare.shape == expected.shape[1:]
    for row in np.flatnonzero(batch["mask"]).tolist():
        ours = predict._read(Path(job.data.eval_source[row]["id"]), prepare)
        np.testing.assert_allclose(ours, expected[row], atol=1e-6)


def test_a_folder_of_a_run_brings_its_evaluation_along(photographs, tmp_path, capsys):
    config = photograph_config(photographs, [dict(op="decode", apply_exif=False), dict(op="central_crop", size_px=48)])
    train(config, tmp_path / "run")
    job = build(config)
    picture = job.data.eval_source[0]["id"]
    loaded = load_pretrained(tmp_path / "run")
    assert (loaded.image_size, loaded.channels, loaded.preprocess) == ((48, 48), 3, None)
    image = jax.numpy.asarray(next(iter(job.data.eval()))["image"][:1])
    expected = normalize(image, mean=(0.4, 0.5, 0.6), std=(0.2,))
    logits = loaded.model.apply({"params": jax.device_put(loaded.params)}, expected, train=False)[0]
    capsys.readouterr()  # what the training printed
    assert predict.main(["--checkpoint", str(tmp_path / "run"), picture, "--json"]) == 0
    best = lines(capsys)[0]["top"][0]
    assert best["probability"] == pytest.approx(float(jax.nn.softmax(logits).max()), abs=1e-6)
    config.init = dict(path=str(tmp_path / "run"))  # a resize, which the run has not, and the run's mean and std
    config.data.eval_transforms = config.data.train_transforms = [dict(op="resize", size_px=48)]
    config.model, config.augment = dict(drop_path=0.1), dict()
    assert build(config).config["augment"] == dict(mean=(0.4, 0.5, 0.6), std=(0.2, 0.2, 0.2))
    config.augment = dict(mean=(0.1,), std=(0.2,))
    with pytest.raises(
        ConfigError, match=r"augment\.mean is \(0\.1,\), but the pictures of .* through \(0\.4, 0\.5, 0\.6\)"
    ):
        build(config)
    small = tmp_path / "small.png"
    Image.new("RGB", (20, 60)).save(small)
    assert predict.main(["--checkpoint", str(tmp_path / "run"), str(small)]) == 1
    assert f"'{small}': central_crop needs 48 x 48 pixels" in capsys.readouterr().err
    assert predict.main(["--checkpoint", str(tmp_path / "run"), picture, "--image_size", "32"]) == 2
    message = capsys.readouterr().err
    assert "for one image size only what its pictures went through" in message
    assert "'op': 'central_crop', 'size_px': 48" in message


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ([1], "--preprocess [1]: "),
        ({"mean": [0.5]}, "Say it, for example: --preprocess '{"),
        ({"image_size": 16}, "image_size=16 must be two whole numbers"),
        ({"image_size": [8, 8], "mean": [], "std": []}, "one number per channel"),
        ({"image_size": [8, 8], "mean": 0.5, "std": 0.5}, "one number per channel"),
        ({"image_size": [8, 8], "mean": ["a", 0, 0]}, "one number per channel"),
        ({"image_size": [8, 8], "crop_fraction": 0}, "crop_fraction=0 must be above 0 and at most 1"),
        ({"image_size": [8, 8], "crop_fraction": 2}, "crop_fraction=2 must be above 0 and at most 1"),
    ],
    ids=str,
)
def test_a_preparation_that_cannot_be(run, given, message, capsys, monkeypatch):
    monkeypatch.setattr(jaxtyping.config, "jaxtyping_disable", True)  # as in a user's program
    arguments = ["--checkpoint", str(run[0] / "run"), str(run[0] / "pictures" / "0.png")]
    assert predict.main([*arguments, "--preprocess", json.dumps(given)]) == 2
    assert message in capsys.readouterr().err


def test_a_preparation_does_not_put_learned_positions_out_of_place(tmp_path, run, capsys):
    """A picture of 4 x 16 has as many patches as one of 8 x 8."""
    model = ViT(num_classes=3, patch_size=4, width=8, depth=1, mlp_dim=8, num_heads=2)
    params = model.init(jax.random.key(0), jax.numpy.zeros((1, 8, 8, 3)), train=False)["params"]
    save_pretrained(tmp_path / "bare", model, jax.device_get(params), family="vit_flax")
    arguments = ["--checkpoint", str(tmp_path / "bare"), str(run[0] / "pictures" / "0.png")]
    arguments += ["--preprocess", json.dumps({"image_size": [4, 16]})]
    assert predict.main(arguments) == 2
    assert "Give --image_size 4x16, too" in capsys.readouterr().err
    assert predict.main([*arguments, "--image_size", "4x16"]) == 0


def test_an_evaluation_that_draws_random_numbers_is_refused():
    evaluation = evaluation_of(
        dict(image_shape=[8, 8, 3], transforms=[dict(op="random_crop", size_px=8)], mean=[0.0], std=[1.0])
    )
    with pytest.raises(ValueError, match=r"run: no picture has one answer, .*'random_crop'.*--preprocess"):
        predict.as_evaluated(evaluation, "run")


def test_mean_and_std_of_another_number_of_channels(run, capsys):
    folder, _, _ = run
    given = json.dumps({"image_size": [8, 8], "mean": [0.5] * 3, "std": [0.5] * 3})
    arguments = ["--checkpoint", str(folder / "run"), str(folder / "pictures" / "0.png"), "--preprocess", given]
    assert predict.main(arguments) == 2
    assert "takes 1 channels, mean and std are for 3" in capsys.readouterr().err


@pytest.mark.parametrize(("filter", "antialias"), [("bilinear", True), ("bilinear", False), ("bicubic", True)])
@pytest.mark.parametrize("crop", [True, False])
def test_pictures_are_prepared_as_in_the_evaluation_of_the_run(filter, antialias, crop):
    how = dict(filter=filter, antialias=antialias)
    if crop:
        ops = [dict(op="resize_small", size_px=40, **how), dict(op="central_crop", size_px=32)]
    else:
        ops = [dict(op="resize", size_px=(32, 48), **how)]
    size = (32, 32) if crop else (32, 48)
    transforms = [dict(op="decode"), *ops]
    preprocess = preprocess_of(dict(image_shape=[*size, 3], transforms=transforms, mean=[0.5], std=[0.25]))
    assert preprocess is not None
    rng = np.random.default_rng(0)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 12, 3), dtype=np.uint8))
    picture = np.asarray(coarse.resize((120, 90), Image.Resampling.BICUBIC))
    theirs = make_transform(transforms)({"image": picture, "id": "x"})["image"]
    ours = (preprocess(picture) * 0.25 + 0.5) * 255
    assert ours.shape == theirs.shape
    assert abs(ours - theirs).max() < 2.5  # Pillow rounds to whole levels between the two axes
    assert abs(ours - theirs).mean() < 0.5


@pytest.mark.parametrize(
    ("ops", "crop_fraction", "keep_aspect"),
    [
        ([dict(op="resize", size_px=16)], None, True),
        ([dict(op="resize", size_px=(20, 40)), dict(op="central_crop", size_px=(16, 32))], 0.8, False),
        ([dict(op="resize_small", size_px=20), dict(op="central_crop", size_px=16)], 0.8, True),
    ],
)
def test_preprocess_has_the_size_of_the_evaluation(ops, crop_fraction, keep_aspect):
    preprocess = preprocess_of(dict(image_shape=[8, 8, 3], transforms=ops, mean=[0.0], std=[1.0]))
    assert preprocess is not None
    assert preprocess.image_size == ((16, 32) if keep_aspect is False else (16, 16))
    assert (preprocess.crop_fraction, preprocess.keep_aspect) == (crop_fraction, keep_aspect)


@pytest.mark.parametrize(
    "ops",
    [
        [dict(op="decode"), dict(op="resize", size_px=8), dict(op="flip")],
        [dict(op="decode", apply_exif=False), dict(op="resize", size_px=8)],
        [dict(op="central_crop", size_px=8)],
        [dict(op="resize_small", size_px=10), dict(op="central_crop", size_px=(8, 6))],
    ],
)
def test_what_a_preprocess_cannot_say_is_not_guessed(ops):
    assert preprocess_of(dict(image_shape=[8, 8, 3], transforms=ops, mean=[0.0], std=[1.0])) is None
