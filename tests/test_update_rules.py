"""Two steps of every rule against NumPy written from its paper, with a gradient that depends on the parameter."""

import jax
import numpy as np
import pytest

from tests.vit_tree import DEPTH, stacked_params, to_loop, train
from vit_flax.optim import make_optimizer

LR, WD = 0.1, 0.3


def run(name: str, steps: int = 2, params=None, **section):
    section = {"lr": LR, "weight_decay": WD, "total_steps": 10, "schedule": "constant"} | section
    return train(make_optimizer(name=name, **section), stacked_params() if params is None else params, steps)


def gradient(p: np.ndarray, t: int) -> np.ndarray:
    return np.cos((2.0 + t) * p)


def adam(b1: float, b2: float, eps: float):
    """The direction of Adam; a fresh function per parameter, because it remembers its moments."""
    m = v = 0.0

    def direction(g, t):
        nonlocal m, v
        m, v = b1 * m + (1 - b1) * g, b2 * v + (1 - b2) * g**2
        return m / (1 - b1**t) / (np.sqrt(v / (1 - b2**t)) + eps)

    return direction


def norm(x: np.ndarray) -> float:
    return float(np.sqrt((x.astype(np.float64) ** 2).sum()))


def check(got: dict, step, **tolerance):
    """Compares each parameter of each layer with two applications of `step(name)`, a function of (parameter, t)."""
    start = jax.tree_util.tree_leaves_with_path(to_loop(stacked_params()))
    end = jax.tree.leaves(to_loop(got))
    for (path, p), result in zip(start, end):
        name = jax.tree_util.keystr(path, simple=True, separator="/")
        p, one_step = p.astype(np.float64), step(name)
        for t in (1, 2):
            p = one_step(p, t)
        np.testing.assert_allclose(result, p, err_msg=name, **({"rtol": 1e-4, "atol": 1e-5} | tolerance))


def decay(name: str) -> float:
    return WD if name.endswith("kernel") else 0.0


def test_adamw():
    def step(name):
        direction = adam(0.8, 0.95, 1e-3)
        return lambda p, t: p - LR * (direction(gradient(p, t), t) + decay(name) * p)

    check(run("adamw", b1=0.8, b2=0.95, eps=1e-3)[0], step)


@pytest.mark.parametrize("nesterov", [False, True])
def test_sgd(nesterov):
    def step(name):
        m = 0.0

        def one(p, t):
            nonlocal m
            g = gradient(p, t)
            m = 0.7 * m + g
            return p - LR * ((g + 0.7 * m if nesterov else m) + decay(name) * p)

        return one

    check(run("sgd", momentum=0.7, nesterov=nesterov)[0], step)


def test_lion():
    def step(name):
        m = 0.0

        def one(p, t):
            nonlocal m
            g = gradient(p, t)
            sign = np.sign(0.8 * m + 0.2 * g)
            m = 0.95 * m + 0.05 * g
            return p - LR * (sign + decay(name) * p)

        return one

    check(run("lion", b1=0.8, b2=0.95)[0], step)


def lamb_step(clip_norm: float | None, weight_decay: float = WD):
    """DeiT III's LAMB: clip the whole gradient, Adam, decay, then the trust ratio where there is decay."""
    leaves = [p.astype(np.float64) for p in jax.tree.leaves(to_loop(stacked_params()))]
    paths = [path for path, _ in jax.tree_util.tree_leaves_with_path(to_loop(stacked_params()))]
    names = [jax.tree_util.keystr(path, simple=True, separator="/") for path in paths]
    directions = [adam(0.9, 0.999, 1e-6) for _ in leaves]
    for t in (1, 2):
        grads = [gradient(p, t) for p in leaves]
        total = np.sqrt(sum(norm(g) ** 2 for g in grads))
        factor = min(1.0, clip_norm / total) if clip_norm else 1.0
        for i, name in enumerate(names):
            update = directions[i](factor * grads[i], t)
            if name.endswith("kernel") and weight_decay:
                update = update + weight_decay * leaves[i]
                update = update * norm(leaves[i]) / norm(update)
            leaves[i] = leaves[i] - LR * update
    return leaves


@pytest.mark.parametrize(
    ("section", "clip_norm", "weight_decay"),
    [({}, 1.0, WD), ({"clip_norm": 0}, None, WD), ({"clip_norm": 0.2}, 0.2, WD), ({"weight_decay": 0.0}, 1.0, 0.0)],
    ids=["default clip", "no clip", "own clip", "no decay, no ratio"],
)
def test_lamb_is_deit_iii_lamb(section, clip_norm, weight_decay):
    got = jax.tree.leaves(to_loop(run("lamb", **section)[0]))
    for result, want in zip(got, lamb_step(clip_norm, weight_decay)):
        np.testing.assert_allclose(result, want, rtol=1e-4, atol=1e-5)


def test_lars():
    def step(name):
        m = 0.0

        def one(p, t):
            nonlocal m
            g = gradient(p, t)
            if name.endswith("kernel"):
                g = g + WD * p
                g = g * 0.02 * norm(p) / norm(g)
            m = 0.8 * m + g
            return p - LR * m

        return one

    check(run("lars", momentum=0.8, trust_coefficient=0.02)[0], step)


def test_lars_takes_the_ratio_without_decay_and_survives_zero_weights():
    params = stacked_params()
    params["head"]["kernel"][:] = 0.0
    got, _ = run("lars", 1, params, weight_decay=0.0)
    np.testing.assert_allclose(got["head"]["kernel"], -LR * gradient(params["head"]["kernel"], 1), rtol=1e-5)
    p, g = params["patch_embed"]["kernel"], gradient(params["patch_embed"]["kernel"], 1)
    np.testing.assert_allclose(got["patch_embed"]["kernel"], p - LR * 0.001 * norm(p) / norm(g) * g, rtol=1e-5)


def adafactor_step(factored_from: int, momentum: float, b2_cap: float = 0.999, limit: float | None = None):
    def step(name):
        row, column, full, m = 0.0, 0.0, 0.0, 0.0

        def one(p, t):
            nonlocal row, column, full, m
            g = gradient(p, t)
            keep = min(b2_cap, 1.0 - t**-0.8)
            square = g**2 + 1e-30
            small, large = np.argsort(p.shape)[-2:] if p.ndim > 1 else (0, 0)
            if p.ndim > 1 and p.shape[small] >= factored_from:
                row = keep * row + (1 - keep) * square.mean(large, keepdims=True)
                column = keep * column + (1 - keep) * square.mean(small, keepdims=True)
                second = row * column / row.mean(small, keepdims=True)
            else:
                second = full = keep * full + (1 - keep) * square
            update = g / np.sqrt(second)
            if limit:
                update = update / max(1.0, np.sqrt((update**2).mean()) / limit)
            m = momentum * m + (1 - momentum) * update if momentum else update
            return p - LR * (m + decay(name) * p)

        return one

    return step


def test_adafactor_with_big_vision_numbers():
    got = run("adafactor", min_dim_size_to_factor=4, mu_dtype=None)[0]
    check(got, adafactor_step(4, 0.9))


def test_adafactor_knobs():
    section = {"momentum": None, "b2_cap": 0.3, "clipping_threshold": 0.5, "min_dim_size_to_factor": 100}
    params = {"head": stacked_params()["head"]}
    got, _ = run("adafactor", params=params, **section)
    want = adafactor_step(100, 0.0, 0.3, 0.5)("head/kernel")
    p = want(want(params["head"]["kernel"].astype(np.float64), 1), 2)
    np.testing.assert_allclose(got["head"]["kernel"], p, rtol=1e-4, atol=1e-5)


def newton_schulz(m: np.ndarray) -> np.ndarray:
    """Five quintic iterations on one matrix (Jordan et al. 2024)."""
    x = m if m.shape[0] <= m.shape[1] else m.T
    x = x / (np.linalg.norm(x) + 1e-8)
    for _ in range(5):
        a = x @ x.T
        x = 3.4445 * x + (-4.7750 * a + 2.0315 * a @ a) @ x
    return x if m.shape[0] <= m.shape[1] else x.T


@pytest.mark.parametrize("consistent_rms", [0.2, None])
def test_muon_orthogonalises_each_layers_matrix_and_leaves_the_rest_to_adam(consistent_rms):
    def step(name):
        direction, m = adam(0.9, 0.999, 1e-8), 0.0

        def one(p, t):
            nonlocal m
            g = gradient(p, t)
            if not (name.startswith("block_") and name.endswith("kernel")):
                return p - LR * (direction(g, t) + decay(name) * p)
            m = 0.95 * m + 0.05 * g
            # Nesterov with the bias corrections of optax: the momentum as of the next step.
            ahead = 0.95 * m / (1 - 0.95 ** (t + 1)) + 0.05 * g / (1 - 0.95**t)
            rows = p.shape[0] * p.shape[1] if "out/" in name else p.shape[0]
            matrix = newton_schulz(ahead.reshape(rows, -1))
            n, k = matrix.shape
            size = max(1, k / n) ** 0.5 if consistent_rms is None else consistent_rms * max(n, k) ** 0.5
            return p - LR * (size * matrix.reshape(p.shape) + decay(name) * p)

        return one

    check(run("muon", consistent_rms=consistent_rms)[0], step, rtol=2e-3, atol=2e-4)


def test_muon_matrices_may_be_chosen():
    one = run("muon", 1, matrices=["block_.*/mlp/fc1/kernel"], weight_decay=0.0)[0]
    moved = jax.tree.map(lambda a, b: a - b, one, stacked_params())
    adam_moves = np.abs(moved["blocks"]["attention"]["query"]["kernel"])
    np.testing.assert_allclose(adam_moves, LR, rtol=1e-3)  # the size of Adam's first step
    assert np.abs(moved["blocks"]["mlp"]["fc1"]["kernel"]).std() > 0.005
    with pytest.raises(ValueError, match="'blocks/mlp/fc3/kernel' matches no parameter"):
        run("muon", matrices=["blocks/mlp/fc3/kernel"])


def test_muon_takes_all_layers_of_a_stacked_parameter_or_none():
    with pytest.raises(ValueError, match=r"layers of 'blocks/mlp/fc1/kernel' are one array.*1 of 3"):
        run("muon", 1, matrices=["block_0/mlp/.*kernel"])
    one = run("muon", 1, to_loop(stacked_params()), matrices=["block_0/mlp/.*kernel"], weight_decay=0.0)[0]
    moved = np.abs(
        one["block_1"]["mlp"]["fc1"]["kernel"] - to_loop(stacked_params())["block_1"]["mlp"]["fc1"]["kernel"]
    )
    np.testing.assert_allclose(moved, LR, rtol=1e-3)  # the size of Adam's first step


@pytest.mark.parametrize("name", ["adamw", "sgd", "lion", "lamb", "lars", "muon", "adafactor"])
def test_mu_dtype_is_that_of_the_momentum(name):
    tx = make_optimizer(name=name, mu_dtype="bfloat16", lr=LR, weight_decay=WD, total_steps=10)
    kept = [x.dtype for x in jax.tree.leaves(jax.eval_shape(tx.init, stacked_params()))]
    assert kept.count(np.dtype("bfloat16")) == len(jax.tree.leaves(stacked_params()))


def test_schedule_free_weights_steps_by_the_learning_rate():
    """With warm-up, weight_lr_power 0 averages all steps alike and 2 prefers the later, larger ones."""
    even, late = (run("schedule_free", 4, warmup_steps=4, weight_lr_power=power)[0] for power in (0.0, 2.0))
    assert np.abs(even["head"]["kernel"] - late["head"]["kernel"]).max() > 1e-4


def test_stacked_layers_have_their_own_trust_ratio():
    params = stacked_params()
    params["blocks"]["mlp"]["fc1"]["kernel"] *= np.array([1.0, 10.0, 100.0]).reshape(DEPTH, 1, 1).astype(np.float32)
    got, _ = run("lamb", 1, params, weight_decay=1e-6)
    moved = got["blocks"]["mlp"]["fc1"]["kernel"] - params["blocks"]["mlp"]["fc1"]["kernel"]
    for i in range(DEPTH):
        np.testing.assert_allclose(norm(moved[i]), LR * norm(params["blocks"]["mlp"]["fc1"]["kernel"][i]), rtol=1e-3)
