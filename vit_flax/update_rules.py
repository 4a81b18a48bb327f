"""What an optimiser's name stands for: the steps of the chain that turn a gradient into a direction.

A rule takes the parameter groups and the weight decay (in AdamW units), and as keyword arguments the keys of the
`optim` section that are its own. It returns a direction of the size that the learning rate is made for.
"""

import inspect
import math
from collections.abc import Callable
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
import optax
from optax import contrib

from vit_flax.param_groups import ParamGroups, any_match
from vit_flax.schedules import Schedule
from vit_flax.tree_paths import name_of
from vit_flax.typing import ArrayLike, PyTree


class Rule(NamedTuple):
    """The steps that a name stands for; weight decay is added between the first two, `wrap` goes around the chain."""

    direction: optax.GradientTransformation
    after_decay: optax.GradientTransformation = optax.identity()
    wrap: Callable[[optax.GradientTransformation, Schedule], optax.GradientTransformation] = lambda steps, _: steps


def adamw(
    groups: ParamGroups,
    weight_decay: ArrayLike,
    /,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    mu_dtype: str | None = None,
) -> Rule:
    """Adam with decoupled weight decay (Loshchilov and Hutter 2019, arXiv:1711.05101)."""
    return Rule(optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype))


def sgd(
    groups: ParamGroups,
    weight_decay: ArrayLike,
    /,
    *,
    momentum: ArrayLike | None = 0.9,
    nesterov: bool = False,
    mu_dtype: str | None = None,
) -> Rule:
    """Stochastic gradient descent; momentum None keeps no buffer. The decay is decoupled, not part of the momentum."""
    if nesterov and momentum is None:
        raise ValueError("'sgd' with nesterov=True looks ahead along its momentum: give one, such as 0.9, not None.")
    return Rule(optax.identity() if momentum is None else optax.trace(momentum, nesterov, mu_dtype))


def lion(
    groups: ParamGroups,
    weight_decay: ArrayLike,
    /,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.99,
    mu_dtype: str | None = None,
) -> Rule:
    """The sign of an interpolated momentum (Chen et al. 2023, arXiv:2302.06675)."""
    return Rule(optax.scale_by_lion(b1, b2, mu_dtype))


def lamb(
    groups: ParamGroups,
    weight_decay: ArrayLike,
    /,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-6,
    mu_dtype: str | None = None,
) -> Rule:
    """Adam with decay, scaled so that its norm is the parameter's (You et al. 2020, arXiv:1904.00962).

    As DeiT III trains with it (apex FusedLAMB): the ratio is taken only where there is weight decay, hence nowhere if
    weight_decay is 0, and the gradient is clipped at norm 1 unless the config says otherwise.

    Deviation: FusedLAMB sees query, key and value of one block as one matrix with one ratio; here each has its own.
    """
    adapted = jax.tree.map(lambda decay: decay * weight_decay != 0, groups.decay)
    return Rule(optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype), _scale_by_trust_ratio(groups.stacked, adapted))


def lars(
    groups: ParamGroups,
    weight_decay: ArrayLike,
    /,
    *,
    momentum: ArrayLike = 0.9,
    trust_coefficient: ArrayLike = 0.001,
    mu_dtype: str | None = None,
) -> Rule:
    """Momentum on gradients whose norm is a fraction of the parameter's (You et al. 2017, arXiv:1708.03888).

    As MAE's linear probe has it (util/lars.py): decay and ratio go to the parameters of the decay mask, the ratio even
    if weight_decay is 0, and the learning rate comes after the momentum.
    """
    adapted = jax.tree.map(lambda decay: decay != 0, groups.decay)
    ratio = _scale_by_trust_ratio(groups.stacked, adapted, trust_coefficient)
    return Rule(optax.identity(), optax.chain(ratio, optax.trace(momentum, accumulator_dtype=mu_dtype)))


def adafactor(
    groups: ParamGroups,
    weight_decay: ArrayLike,
    /,
    *,
    momentum: ArrayLike | None = 0.9,
    decay_exponent: ArrayLike = 0.8,
    b2_cap: ArrayLike = 0.999,
    eps: ArrayLike = 1e-30,
    clipping_threshold: ArrayLike | None = None,
    min_dim_size_to_factor: int = 32,
    mu_dtype: str | None = "bfloat16",
) -> Rule:
    """Adam's scaling with factored second moments (Shazeer and Stern 2018, arXiv:1804.04235) as in big_vision.

    The second moment keeps min(b2_cap, 1 - t^-decay_exponent); momentum in bfloat16, no scaling by the parameter's
    size, no clipping by default (big_vision/optax.py:scale_by_adafactor; Zhai et al. 2022, arXiv:2106.04560).
    `clipping_threshold` is of the root mean square of each layer's update.

    Deviation: a stacked vector [l, d] is factored across layers when l >= min_dim_size_to_factor, as in big_vision's
    scan; the loop's vectors [d] are not, so the two layouts agree only below that depth.
    """

    def second_moment_decay(step: ArrayLike, exponent: ArrayLike) -> ArrayLike:
        return jnp.minimum(b2_cap, 1.0 - (jnp.asarray(step, jnp.float32) + 1.0) ** -jnp.asarray(exponent))

    scale = optax.scale_by_factored_rms(
        decay_rate=decay_exponent,
        min_dim_size_to_factor=min_dim_size_to_factor,
        epsilon=eps,
        decay_rate_fn=second_moment_decay,
    )
    limit = optax.identity() if clipping_threshold is None else _clip_rms(groups.stacked, clipping_threshold)
    average = optax.identity() if momentum is None else optax.ema(momentum, debias=False, accumulator_dtype=mu_dtype)
    return Rule(optax.chain(scale, limit, average))


def muon(
    groups: ParamGroups,
    weight_decay: ArrayLike,
    /,
    *,
    matrices: tuple[str, ...] | list[str] = (r"(.*/)?blocks/.*kernel",),
    momentum: ArrayLike = 0.95,
    nesterov: bool = True,
    ns_steps: int = 5,
    consistent_rms: ArrayLike | None = 0.2,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    mu_dtype: str | None = None,
) -> Rule:
    """Orthogonalised momentum for the matrices of the blocks, Adam (b1, b2, eps) for everything else.

    Each layer's matrix is orthogonalised on its own, query, key and value as d x (heads * head_dim). `consistent_rms`
    0.2 gives the update the usual size of Adam's, so that both share one learning rate and one weight decay; None
    scales by sqrt(max(1, out / in)) as in Jordan's code. `matrices` must name all layers of a stacked parameter or
    none; anything else is a ValueError.

    Source: Jordan et al. 2024 (kellerjordan.github.io/posts/muon); Liu et al. 2025 (arXiv:2502.16982), section 2.2.
    """

    def label(path, hit: np.ndarray) -> str:
        if hit.any() and not hit.all():
            raise ValueError(
                f"matrices: the layers of {name_of(path)!r} are one array, and all of them are orthogonalised or none; "
                f"found patterns for {hit.sum()} of {hit.size}. Name all, as in 'blocks/.*kernel', or none."
            )
        return "matrix" if hit.any() else "other"

    def labels(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(label, any_match(matrices, params, "matrices"))

    def dimension_numbers(params: PyTree) -> PyTree:
        return jax.tree_util.tree_map_with_path(lambda path, x: _matrix_axes(name_of(path)), params)

    orthogonal = contrib.scale_by_muon(
        ns_steps=ns_steps,
        beta=momentum,
        eps=eps,
        mu_dtype=mu_dtype,
        nesterov=nesterov,
        weight_dimension_numbers=dimension_numbers,
    )

    def resize(u, axes: contrib.MuonDimensionNumbers):
        rows, columns = (math.prod(u.shape[a] for a in np.atleast_1d(axis)) for axis in axes)
        return u * (
            max(1, columns / rows) ** 0.5 if consistent_rms is None else consistent_rms * max(rows, columns) ** 0.5
        )

    size = optax.stateless(lambda u, _: jax.tree.map(resize, u, dimension_numbers(u)))
    adam = optax.scale_by_adam(b1, b2, eps, mu_dtype=mu_dtype)
    return Rule(optax.partition({"matrix": optax.chain(orthogonal, size), "other": adam}, labels))


def schedule_free(
    groups: ParamGroups,
    weight_decay: ArrayLike,
    /,
    *,
    b1: ArrayLike = 0.9,
    b2: ArrayLike = 0.999,
    eps: ArrayLike = 1e-8,
    weight_lr_power: ArrayLike = 2.0,
) -> Rule:
    """AdamW with an average over the run in place of momentum and schedule (Defazio et al. 2024, arXiv:2405.15682).

    The parameters are the points where gradients are taken; evaluate `optim.eval_params(opt_state, params)`.
    """
    if isinstance(b1, int | float) and b1 == 0:
        raise ValueError("'schedule_free' with b1=0 keeps no average to evaluate: give b1 above 0, such as 0.9.")

    def wrap(steps: optax.GradientTransformation, lr_at: Schedule) -> optax.GradientTransformation:
        return contrib.schedule_free(steps, lr_at, b1, weight_lr_power)

    return Rule(optax.scale_by_adam(0.0, b2, eps), wrap=wrap)


RULES: dict[str, Callable[..., Rule]] = {
    "adamw": adamw,
    "sgd": sgd,
    "lion": lion,
    "lamb": lamb,
    "lars": lars,
    "adafactor": adafactor,
    "muon": muon,
    "schedule_free": schedule_free,
}
CLIP_NORMS = {"lamb": 1.0}  # apex FusedLAMB and timm's Lamb clip unless told otherwise: max_grad_norm=1.0


def find_rule(name: str, arguments: dict[str, Any], schedule: str) -> Callable[..., Rule]:
    """Looks a rule up and checks its arguments.

    Raises:
        ValueError: an unknown name, an argument the rule does not take, a schedule it does not go with.
    """
    if name not in RULES:
        raise ValueError(f"Unknown optimiser {name=}; expected one of {', '.join(RULES)}.")
    known = [p.name for p in inspect.signature(RULES[name]).parameters.values() if p.kind == p.KEYWORD_ONLY]
    if unknown := sorted(set(arguments) - set(known)):
        raise ValueError(f"The optimiser {name!r} takes no {', '.join(unknown)}; its arguments are {', '.join(known)}.")
    if name == "schedule_free" and schedule != "constant":
        raise ValueError(
            f"'schedule_free' replaces the decay of the learning rate: schedule='constant', not {schedule!r}."
        )
    return RULES[name]


def _clip_rms(stacked: PyTree, threshold: ArrayLike) -> optax.GradientTransformation:
    """Scales updates down to a root mean square of at most the threshold, per layer."""

    def clipped(u, stacked):
        rms = jnp.sqrt(jnp.mean(jnp.square(u), tuple(range(int(stacked), u.ndim)), keepdims=True))
        return u / jnp.maximum(1.0, rms / threshold)

    return optax.stateless(lambda u, _: jax.tree.map(clipped, u, stacked))


def _scale_by_trust_ratio(
    stacked: PyTree, adapted: PyTree, coefficient: ArrayLike = 1.0
) -> optax.GradientTransformation:
    """Multiplies updates by coefficient * |parameter| / |update|, per layer, where `adapted` and both norms allow."""

    def scaled(u, p, stacked, adapted):
        axes = tuple(range(int(stacked), u.ndim))
        p_norm, u_norm = (jnp.sqrt(jnp.sum(jnp.square(x), axes, keepdims=True)) for x in (p, u))
        usable = adapted & (p_norm > 0) & (u_norm > 0)
        return u * jnp.where(usable, coefficient * p_norm / jnp.where(usable, u_norm, 1.0), 1.0)

    return optax.stateless(lambda u, p: jax.tree.map(scaled, u, p, stacked, adapted))


def _matrix_axes(name: str) -> contrib.MuonDimensionNumbers:
    """Which trailing axes of a kernel are its rows and columns; axes in front of them (the layer) are apart."""
    if name.endswith(("query/kernel", "key/kernel", "value/kernel")):
        return contrib.MuonDimensionNumbers(-3, (-2, -1))
    if name.endswith("out/kernel"):
        return contrib.MuonDimensionNumbers((-3, -2), -1)
    return contrib.MuonDimensionNumbers(-2, -1)
