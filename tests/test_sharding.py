import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import topologies
from jax.sharding import AxisType

from jaxformer import sharding, steps
from jaxformer.errors import InputError
from jaxformer.models.vit import ViT
from jaxformer.optim import AdamW, Constant, Muon
from jaxformer.plan import chips
from jaxformer.sharding import DATA_PARALLEL, FSDP, FSDP_TENSOR, explain, make_mesh

MODEL = ViT(width=16, depth=2, mlp_dim=32, num_heads=2, patch=4, num_classes=6)


@pytest.fixture(scope="module")
def boxed():
    images = jnp.zeros((1, 8, 8, 1))
    return jax.eval_shape(MODEL.init, jax.random.key(0), images)["params"]


def test_make_mesh_has_every_axis_and_auto_types():
    mesh = make_mesh("data=2, fsdp=4")
    assert dict(mesh.shape) == {"data": 2, "fsdp": 4, "tensor": 1, "seq": 1, "expert": 1}
    assert set(mesh.axis_types) == {AxisType.Auto}
    assert make_mesh().shape["data"] == 8
    assert make_mesh({"tensor": 3}, jax.devices()[:3]).size == 3


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ("model=2", "mesh: no axis is named 'model'; choose from data, fsdp, tensor"),
        ("data=0", "mesh: data=0 must be a positive integer"),
        ("data=3", "mesh: data=3 needs 3 devices but there are 8; .* for instance data=8"),
        ("data=2,fsdp=8", "needs 16 devices but there are 8"),
        ("data:2", "mesh: 'data:2' must be AXIS=SIZE"),
    ],
)
def test_meshes_that_do_not_fit(sizes, message):
    with pytest.raises(InputError, match=message):
        make_mesh(sizes)


QUERY, DOWN = "stack/block/attention/query/kernel", "stack/block/mlp/down/kernel"


def test_only_data_crosses_the_network_between_slices(monkeypatch):
    for name, value in chips.ENVIRONMENT.items():
        monkeypatch.setenv(name, value)
    topology = topologies.get_topology_desc(
        platform="tpu", topology_name="v5e:4x4", num_slices=2
    )
    mesh = make_mesh("data=4,fsdp=4,tensor=2", topology.devices)
    for axis, name in enumerate(mesh.axis_names):
        lines = np.moveaxis(mesh.devices, axis, -1).reshape(-1, mesh.shape[name])
        crossed = {len({device.slice_index for device in line}) for line in lines}
        assert crossed == ({2} if name == "data" else {1})
    with pytest.raises(InputError, match="data=1 must be a multiple of the 2 slices"):
        make_mesh("fsdp=32", topology.devices)


@pytest.mark.parametrize(
    ("rules", "expected"),
    [
        (DATA_PARALLEL, {QUERY: [None] * 4, DOWN: [None] * 3}),
        (FSDP, {QUERY: [None, "fsdp", None, None], DOWN: [None, None, "fsdp"]}),
        (FSDP_TENSOR, {QUERY: [None, "fsdp", "tensor", None], DOWN: [None, "tensor", "fsdp"]}),
    ],
)
def test_rule_tables(rules, expected, boxed):
    found = explain(boxed, make_mesh("fsdp=4,tensor=2"), rules)
    rows = {row.path: list(row.mesh_axes) for row in found.rows}
    assert not found.problems and {k: rows[k] for k in expected} == expected


def test_explain_counts_the_bytes_that_a_device_really_holds(boxed):
    mesh = make_mesh("fsdp=4,tensor=2")
    found = explain(boxed, mesh, FSDP_TENSOR)
    places = sharding.shardings(boxed, mesh, FSDP_TENSOR)
    zeros = jax.tree.map(
        lambda x, s: jax.device_put(jnp.zeros(x.shape), s), sharding.nn.unbox(boxed), places
    )
    held = sum(x.addressable_shards[0].data.nbytes for x in jax.tree.leaves(zeros))
    assert sum(row.bytes_per_device for row in found.rows) == held
    assert "head/kernel" in str(found) and f"{held:,} on each device" in str(found)


def test_explain_says_what_does_not_divide_and_what_would(boxed):
    found = explain(boxed, make_mesh("tensor=8"), FSDP_TENSOR)
    (line,) = [p for p in found.problems if p.startswith("head/bias")]
    assert line == (
        "head/bias (6,): axis 'vocab' of size 6 does not divide over tensor=8; choose one of "
        "[1, 2, 3, 6], or keep the axis whole with replicate=vocab"
    )
    assert len(found.problems) > 2, "all of them, not the first"
    with pytest.raises(InputError, match=r"head/bias .*'heads'"):
        sharding.shardings(boxed, make_mesh("tensor=8"), FSDP_TENSOR)
    whole = sharding.without(FSDP_TENSOR, ("vocab", "heads", "kv_heads"))
    assert not explain(boxed, make_mesh("tensor=8"), whole).problems


def test_rules_that_name_no_axis_of_the_mesh(boxed):
    rules = (("embed", "model"),)
    (line,) = explain(boxed, make_mesh(), rules).problems
    assert line.startswith("rules: 'embed' goes to mesh axis 'model', which this mesh has not")
    with pytest.raises(InputError, match="no logical axis is named 'wide'"):
        sharding.without(FSDP, ("wide",))


@pytest.mark.parametrize("recipe", [AdamW(Constant(1e-3)), Muon(Constant(1e-3))], ids=str)
def test_optimizer_state_lies_as_its_parameters_do(recipe, boxed):
    mesh = make_mesh("fsdp=4,tensor=2")
    places = sharding.shardings(boxed, mesh, FSDP_TENSOR)
    params = sharding.nn.unbox(boxed)
    tx = recipe.make(sharding.nn.get_partition_spec(boxed), 10)
    state = jax.eval_shape(lambda p: steps.init_state(p, tx, ema=True), params)
    found = sharding.shardings_like(state, places, mesh)
    split = whole = 0
    for (path, leaf), place in zip(
        jax.tree.leaves_with_path(state), jax.tree.leaves(found), strict=True
    ):
        if "down/kernel" in sharding.path_name(path):
            assert list(place.spec) == [None, "tensor", "fsdp"]
        split += leaf.size * any(place.spec)
        whole += leaf.size * (not any(place.spec))
    assert whole < 0.02 * split, "only counts and head_dim scales stay whole"


def test_sharded_forward_equals_unsharded(key):
    images = jax.random.normal(key, (8, 8, 8, 1))
    params = sharding.nn.unbox(MODEL.init(key, images))["params"]
    expected = MODEL.apply({"params": params}, images)
    mesh = make_mesh("data=2,fsdp=2,tensor=2")
    boxed = jax.eval_shape(MODEL.init, key, images)["params"]
    placed = jax.device_put(params, sharding.shardings(boxed, mesh, FSDP_TENSOR))
    with sharding.use(mesh, FSDP_TENSOR):
        batch = jax.device_put(images, sharding.batch_sharding(mesh, FSDP_TENSOR))
        found = jax.jit(MODEL.apply)({"params": placed}, batch)
    np.testing.assert_allclose(found, expected, atol=1e-5)


def test_constrain_places_activations_under_rules_only(key):
    x = jnp.zeros((8, 4, 2, 3))
    assert sharding.constrain(x, "BTNH") is x
    mesh = make_mesh("data=4,tensor=2")
    with sharding.use(mesh, FSDP_TENSOR):
        y = jax.jit(lambda x: sharding.constrain(x, "BTNH"))(x)
        odd = jnp.zeros((8, 4, 3, 3))
        with pytest.raises(InputError, match=r"N of size 3 does not divide over tensor=2"):
            jax.jit(lambda x: sharding.constrain(x, "BTNH"))(odd)
    assert y.sharding.shard_shape(y.shape) == (2, 4, 1, 3)
