"""Properties of the forward pass that hold for every Qwen."""

from __future__ import annotations

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from qwen_jax import model, sharding
from qwen_jax.config import DualChunk, DynamicNTK, Moe, QwenNTK, Rope, Score, Yarn
from qwen_jax.ops.loss import chunked_cross_entropy
from tests import paged
from tests.conftest import tiny_config

# float32 sums taken in another order: a few units in the last place of numbers of size one.
ROUNDING = dict(rtol=1e-5, atol=1e-6)
ATTENTION = ("xla", "reference")
NTK = Rope(theta=12345.0, scaling=QwenNTK(original_positions=4))
YARN = Rope(
    theta=12345.0,
    scaling=Yarn(factor=4.0, original_positions=6, beta_fast=0.5, beta_slow=0.01, attention_factor=1.3),
)

MOE = dict(mlp_width=0, moe=Moe(num_experts=6, top_k=3, expert_width=8, shared_width=0, normalize_top_k=True))
SHARED = dict(mlp_width=0, moe=Moe(num_experts=8, top_k=3, expert_width=16, shared_width=24, normalize_top_k=False))


def parameters(config):
    """Parameters far from their start: scales, biases and all. Drawn outside jax, which would compile each shape."""
    rng = np.random.default_rng(0)

    def draw(path, x):
        start = 1.0 if path[-1].key == "scale" else 0.0
        return np.asarray(start + 0.15 * rng.normal(size=x.shape), x.dtype)

    return jax.tree.map_with_path(draw, model.abstract(config))


forward = jax.jit(model.forward, static_argnames=("config", "remat", "attention"))


def hidden_states(config, params, tokens, positions=None, **kwargs):
    tokens = jnp.asarray(tokens, jnp.int32)
    if positions is None:
        positions = jnp.broadcast_to(jnp.arange(tokens.shape[1]), tokens.shape)
    return forward(config, params, tokens, jnp.asarray(positions, jnp.int32), **kwargs)


def ids(*shape, seed=0, vocab=96):
    return np.random.default_rng(seed).integers(0, vocab, shape).astype(np.int32)


@pytest.mark.parametrize("attention", ATTENTION)
@pytest.mark.parametrize("windows", [(), (0, 3, 5)])
def test_no_gradient_flows_from_a_token_to_an_earlier_one(mesh, attention, windows):
    config = tiny_config(windows=windows)
    params = parameters(config)
    tokens = ids(1, 9)

    def output_at(table, t):
        # Each token has its own row of the table, so a row's gradient is that token's.
        own = params | {"embed": {"w": table}}
        hidden = hidden_states(config, own, np.arange(9)[None], attention=attention)
        at_t = jnp.arange(9)[None, :, None] == t
        return jnp.where(at_t, hidden**2, 0).sum()

    table = params["embed"]["w"].copy()
    table[:9] = table[tokens[0]]
    gradient = jax.jit(jax.grad(output_at))
    for t in (0, 3, 7):
        by_token = np.abs(gradient(table, t)).sum(axis=1)[:9]
        assert (by_token[t + 1 :] == 0).all()
        assert by_token[t] > 0
        if not windows:
            assert (by_token[: t + 1] > 0).all()


@pytest.mark.parametrize("attention, scan, changes", [("xla", True, {}), ("reference", False, dict(rope=YARN, logn=3))])
def test_packed_documents_equal_separate_ones(mesh, attention, scan, changes):
    config = tiny_config(**changes, num_layers=2)
    params = parameters(config)
    params = params if scan else model.unstack_layers(params)
    lengths = (5, 1, 7)
    documents = [ids(1, n, seed=n) for n in lengths]
    packed = np.concatenate(documents, axis=1)
    positions = np.concatenate([np.arange(n) for n in lengths])[None]
    segments = np.repeat(np.arange(1, 4), lengths)[None].astype(np.int32)

    def loss_packed(params):
        hidden = hidden_states(config, params, packed, positions, segments=jnp.asarray(segments), attention=attention)
        return (jnp.sin(hidden) ** 3).sum(), hidden

    def loss_separate(params):
        hidden = [hidden_states(config, params, document, attention=attention) for document in documents]
        hidden = jnp.concatenate(hidden, axis=1)
        return (jnp.sin(hidden) ** 3).sum(), hidden

    (_, together), packed_gradient = jax.jit(jax.value_and_grad(loss_packed, has_aux=True))(params)
    (_, apart), separate_gradient = jax.jit(jax.value_and_grad(loss_separate, has_aux=True))(params)
    np.testing.assert_allclose(together, apart, **ROUNDING)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4), packed_gradient, separate_gradient
    )


MESHES = [
    dict(fsdp=4, tensor=2),
    dict(data=2, fsdp=2, tensor=2),
    dict(context=2, fsdp=2),
    dict(tensor=4),  # more ways than kv heads
    dict(expert=2, context=4),
]


def loss_and_norm(config, sizes, attention="auto"):
    devices = jax.devices()[: int(np.prod(list(sizes.values()), dtype=int))]
    rows, length = 8, 16
    tokens = ids(rows, length + 1)
    positions = np.tile(np.arange(length, dtype=np.int32) % 10, (rows, 1))
    segments = np.tile(1 + np.arange(length, dtype=np.int32) // 10, (rows, 1))
    weights = np.linspace(0, 1, rows * length, dtype=np.float32).reshape(rows, length)

    def loss(params, tokens, targets, positions, segments, weights):
        how = dict(segments=segments, attention=attention, balanced=True)
        hidden = model.forward(config, params, tokens, positions, **how)
        return chunked_cross_entropy(hidden, model.head(params), targets, weights) / weights.sum()

    with jax.set_mesh(sharding.make_mesh(devices=devices, **sizes)):
        params = jax.tree.map(
            lambda x, like: jax.device_put(x, like.sharding.spec), parameters(config), model.abstract(config)
        )
        order = sharding.balanced_columns(length)
        batch = [
            sharding.put(x.shape, x.dtype, "bt", lambda index, x=x[:, order]: x[index])
            for x in (tokens[:, :-1], tokens[:, 1:], positions, segments, weights)
        ]
        value, gradient = jax.jit(jax.value_and_grad(loss))(params, *batch)
        return float(value), float(np.sqrt(sum((np.asarray(x) ** 2).sum() for x in jax.tree.leaves(gradient))))


@pytest.mark.parametrize("tied", [True, False])
def test_loss_and_gradient_norm_are_the_same_on_every_mesh(tied):
    # What goes by the length of a row, of which a device may have a part, is the same too.
    by_length = dict(rope=NTK, logn=4) if tied else {}
    config = tiny_config(tie_embeddings=tied, width=64, vocab_size=128, mlp_width=64, num_layers=2, **by_length)
    expected = loss_and_norm(config, {})
    for sizes in MESHES if tied else MESHES[1:2]:
        np.testing.assert_allclose(loss_and_norm(config, sizes), expected, rtol=1e-5, err_msg=str(sizes))


def test_a_mixture_of_experts_is_the_same_on_every_mesh():
    config = tiny_config(**SHARED, width=64, vocab_size=128, num_layers=1)
    expected = loss_and_norm(config, {})
    for sizes in (dict(expert=4), dict(expert=2, tensor=2), dict(fsdp=2, expert=2, context=2)):
        np.testing.assert_allclose(loss_and_norm(config, sizes), expected, rtol=1e-5, err_msg=str(sizes))


@pytest.mark.parametrize("scan, remat", [(True, "dots"), (False, "full")])
def test_the_load_of_each_layer(mesh, scan, remat):
    config = tiny_config(**MOE, num_layers=2)
    params = parameters(config) if scan else model.unstack_layers(parameters(config))
    tokens, segments = jnp.asarray(ids(2, 8)), jnp.array([[1] * 8, [1] * 5 + [0] * 3], jnp.int32)
    positions = jnp.tile(jnp.arange(8, dtype=jnp.int32), (2, 1))

    @jax.jit
    def run(params):
        def loss(params):
            hidden, load = model.forward_with_load(config, params, tokens, positions, segments=segments, remat=remat)
            return (load.probabilities[..., 0] ** 2).sum() + load.squares.sum(), (hidden, load)

        return jax.value_and_grad(loss, has_aux=True)(params)

    (_, (hidden, load)), gradient = run(params)
    np.testing.assert_allclose(hidden, hidden_states(config, params, tokens, segments=segments), **ROUNDING)
    assert load.counts.shape == load.probabilities.shape == (2, 2, 6) and load.squares.shape == (2, 2)
    np.testing.assert_allclose(load.counts.sum(-1), [[8 * 3, 5 * 3]] * 2)
    np.testing.assert_allclose(load.probabilities.sum(-1), [[8, 5]] * 2, rtol=1e-5)
    gradient = gradient if scan else model.stack_layers(gradient)
    assert (np.abs(gradient["layers"]["mlp"]["router"]["w"]).sum((1, 2)) > 0).all()


def test_a_dense_model_has_no_load(mesh):
    config = tiny_config(num_layers=1)
    tokens = jnp.asarray(ids(1, 4))
    with pytest.raises(ValueError, match="takes a mixture of experts"):
        jax.eval_shape(lambda params: model.forward_with_load(config, params, tokens, tokens), parameters(config))


def test_each_field_of_the_experts_changes_the_output(mesh):
    base = tiny_config(**SHARED, num_layers=1)
    params, tokens = parameters(base), ids(1, 8)
    expected = hidden_states(base, params, tokens)
    shapes = lambda config: jax.tree.map(lambda x: x.shape, model.abstract(config))
    for changes in (dict(top_k=2), dict(normalize_top_k=True)):
        changed = dataclasses.replace(base, moe=dataclasses.replace(base.moe, **changes))
        assert not np.array_equal(hidden_states(changed, params, tokens), expected), changes
    for changes in (dict(num_experts=9), dict(expert_width=8), dict(shared_width=0)):
        changed = dataclasses.replace(base, moe=dataclasses.replace(base.moe, **changes))
        assert shapes(changed) != shapes(base), changes


def test_experts_start_like_one_mlp(mesh):
    params = jax.jit(model.init, static_argnums=0)(tiny_config(**SHARED, num_layers=2), jax.random.key(7))
    experts = params["layers"]["mlp"]["experts"]
    std = [experts[name]["w"].std() for name in ("gate", "down")]
    np.testing.assert_allclose(std, [32**-0.5, (16 * 4) ** -0.5], rtol=0.05)


def test_parameters_start_the_same_on_every_mesh():
    config = tiny_config(num_layers=2)
    start = jax.jit(lambda key: model.init(config, key))
    trees = []
    for sizes in ({}, dict(data=2, fsdp=2, tensor=2)):
        with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[: 8 if sizes else 1], **sizes)):
            trees.append(jax.tree.map(np.asarray, start(jax.random.key(7))))
    jax.tree.map(np.testing.assert_array_equal, *trees)
    std = lambda name: trees[0]["layers"]["mlp"][name]["w"].std()
    # 1/sqrt(fan-in), and for what is added to the residual stream 1/sqrt(2 L) of it.
    np.testing.assert_allclose([std("gate"), std("down")], [32**-0.5, (40 * 4) ** -0.5], rtol=0.05)


@pytest.mark.parametrize("remat, scan", [("dots", False), ("full", True)])
def test_remat_changes_no_gradient(mesh, remat, scan):
    config = tiny_config(num_layers=2)
    params = parameters(config) if scan else model.unstack_layers(parameters(config))
    loss = lambda params, remat: jnp.sum(hidden_states(config, params, ids(2, 8), remat=remat) ** 2)
    gradient = jax.jit(jax.grad(loss), static_argnums=1)
    jax.tree.map(
        lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4),
        gradient(params, remat),
        gradient(params, "none"),
    )


@pytest.mark.parametrize(
    "changes", [{}, dict(windows=(0, 3, 5)), dict(qk_norm=True, qkv_bias=False, num_kv_heads=4), SHARED]
)
def test_decoding_step_by_step_equals_one_full_pass(mesh, changes):
    config = tiny_config(**changes)
    params = model.unstack_layers(parameters(config))
    tokens = ids(2, 12)
    full = np.asarray(hidden_states(config, params, tokens))
    step = jax.jit(functools.partial(paged.forward, config))
    # Row 1's prompt is shorter: what pads it is overwritten before it can be seen.
    prompts = np.where(np.arange(6) < [[6], [4]], tokens[:, :6], 0)
    hidden, rows = step(params, prompts, np.tile(np.arange(6, dtype=np.int32), (2, 1)), paged.paged(config, 2, 12))
    np.testing.assert_allclose(hidden[0], full[0, :6], **ROUNDING)
    np.testing.assert_allclose(hidden[1, :4], full[1, :4], **ROUNDING)
    for t in range(6):
        at = np.array([[6 + t], [4 + t]], np.int32)
        hidden, rows = step(params, np.take_along_axis(tokens, at, axis=1), at, rows)
        np.testing.assert_allclose(hidden[:, 0], full[np.arange(2), at[:, 0]], **ROUNDING)


def test_layers_unstack_and_stack_to_the_same_tree(mesh):
    params = parameters(tiny_config(num_layers=11))
    again = model.stack_layers(model.unstack_layers({"mu": params, "count": 3}))
    assert again["count"] == 3
    jax.tree.map(np.testing.assert_array_equal, again["mu"], params)


def test_parameter_count_is_the_configs():
    for changes in ({}, dict(tie_embeddings=False), dict(qk_norm=True, qkv_bias=False), MOE, SHARED):
        config = tiny_config(**changes)
        with jax.set_mesh(sharding.make_mesh(devices=jax.devices()[:1])):
            leaves = jax.tree.leaves(model.abstract(config))
        assert sum(x.size for x in leaves) == config.num_parameters


def test_every_field_of_the_config_changes_the_output(mesh):
    base = tiny_config(windows=(0, 0, 0))
    tokens = ids(1, 16)
    params = parameters(base)
    output = lambda config, params: np.asarray(hidden_states(config, params, tokens), np.float32)
    expected = output(base, params)
    # The fields of a scaling are counted in tests/ops/test_rope.py.
    same_tree = dict(norm_eps=1e-1, rope=NTK, logn=9, windows=(2, 2, 2), dtype="bfloat16")
    for name, value in same_tree.items():
        assert not np.array_equal(output(dataclasses.replace(base, **{name: value}), params), expected), name
    other_tree = dict(
        vocab_size=97, width=48, num_layers=2, num_heads=8, num_kv_heads=1, head_dim=6, mlp_width=8,
        qkv_bias=False, qk_norm=True, tie_embeddings=False, param_dtype="bfloat16", score=Score(labels=2, hidden=False),
        moe=MOE["moe"],
    )  # fmt: skip
    shapes = lambda config: jax.tree.map(lambda x: (x.shape, x.dtype), model.abstract(config))
    for name, value in other_tree.items():
        changes = {name: value, "windows": (0,) * (value if name == "num_layers" else 3)}
        changes |= {"mlp_width": 0} if name == "moe" else {}
        assert shapes(dataclasses.replace(base, **changes)) != shapes(base), name
    covered = {*same_tree, *other_tree}
    # How far a prompt may reach is a limit the callers keep; it is no part of the function.
    assert covered | {"max_position"} == {field.name for field in dataclasses.fields(base)}


def test_qwen1_extended_is_plain_within_its_training_length(mesh):
    plain = tiny_config()
    extended = tiny_config(rope=Rope(theta=12345.0, scaling=QwenNTK(original_positions=12)), logn=12)
    params = parameters(plain)
    output = lambda config, length: hidden_states(config, params, ids(2, 16)[:, :length])
    np.testing.assert_array_equal(output(extended, 12), output(plain, 12))


def test_padding_does_not_count_as_length(mesh):
    config = tiny_config(rope=NTK, logn=4)
    params, tokens = parameters(config), ids(2, 16)
    lengths = np.array([[3], [16]])
    at = np.arange(16, dtype=np.int32)
    padded = hidden_states(
        config, params, np.where(at < lengths, tokens, 0), np.tile(at, (2, 1)),
        segments=jnp.asarray(at < lengths, jnp.int32),
    )  # fmt: skip
    plain = hidden_states(tiny_config(), params, tokens[:, :3])
    np.testing.assert_allclose(padded[0, :3], plain[0], **ROUNDING)
    assert np.abs(np.asarray(padded)[1, :3] - plain[1]).max() > 1e-3


@pytest.mark.parametrize(
    "scaling",
    [
        NTK.scaling,
        DynamicNTK(factor=2.0, original_positions=4),
        DualChunk(chunk_size=20, local_size=8, original_positions=4),
    ],
)
def test_rows_in_pages_are_refused_without_the_lengths_they_need(mesh, scaling):
    config, at = tiny_config(rope=Rope(theta=9.0, scaling=scaling)), np.arange(6, dtype=np.int32)[None]
    params = model.unstack_layers(parameters(config))
    with pytest.raises(ValueError, match="give the batch `prompts`"):
        jax.jit(functools.partial(paged.forward, config))(params, at, at, paged.paged(config, 1, 6))


def test_a_token_outside_the_vocabulary_is_not_clamped(mesh):
    config = tiny_config()
    hidden = hidden_states(config, parameters(config), np.array([[1, 2, 96], [1, 2, -1], [1, 2, 95]]))
    assert np.isnan(hidden[:2, 2]).all() and np.isfinite(hidden[2]).all()


def test_bfloat16_is_close_to_float32(mesh):
    config = tiny_config()
    params = parameters(config)
    exact = hidden_states(config, params, ids(2, 12))
    low = hidden_states(dataclasses.replace(config, dtype="bfloat16"), params, ids(2, 12))
    assert low.dtype == jnp.bfloat16
    # bfloat16 keeps 8 bits: a relative step of 2^-8, some layers deep, on outputs of size one.
    assert np.abs(exact - low.astype(jnp.float32)).mean() < 0.03
