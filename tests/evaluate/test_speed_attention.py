"""The rulers of `python -m evaluate.speed attention`, checked on programs that are known."""

import json
import pathlib
import subprocess
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental import pallas as pl
from jax.experimental.pallas import tpu as pltpu

from evaluate.speed import attention, attention_tpu, bundles, rivals, table
from evaluate.speed.__main__ import held
from evaluate.speed.tpu import Job, Program, compile_for, moved_bytes, programs, steering
from jaxformer.errors import InputError


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def probe(bounds, x, y):
    """Products with some tiles of y, from a list, each third one with more work."""

    def kernel(bounds, x, y, out, sums):
        sums[...] = jnp.zeros_like(sums)
        i = pl.program_id(1)

        def body(j, _):
            @pl.when(j % 3 == 0)
            def _():
                sums[...] += 1.0

            tile = y[0, pl.ds(j * 256, 256), :]
            sums[...] += jax.lax.dot_general(
                x[0], tile, (((1,), (1,)), ((), ())), preferred_element_type=jnp.float32
            )
            return 0

        jax.lax.fori_loop(bounds[0, i], bounds[1, i], body, 0)
        out[0] = sums[...].astype(out.dtype)

    B, T, H = x.shape
    return pl.pallas_call(
        kernel,
        out_shape=shape(B, T, 256),
        grid_spec=pltpu.PrefetchScalarGridSpec(
            num_scalar_prefetch=1,
            grid=(B, T // 256),
            in_specs=[
                pl.BlockSpec((1, 256, H), lambda b, i, _: (b, i, 0)),
                pl.BlockSpec((1, T, H), lambda b, i, _: (b, 0, 0)),
            ],
            out_specs=pl.BlockSpec((1, 256, 256), lambda b, i, _: (b, i, 0)),
            scratch_shapes=[pltpu.VMEM((256, 256), jnp.float32)],
        ),
        name="probe",
    )(bounds + 0, x, y)


def test_a_product_moves_its_three_arrays():
    m, k, n = 4096, 8192, 4096  # too large for XLA to keep one on the chip
    compiled = compile_for("v6e:2x2", jnp.matmul, shape(m, k), shape(k, n))
    traffic = moved_bytes(compiled)
    assert traffic.bytes == 2 * (m * k + k * n + m * n)
    assert traffic.loops == []


def test_padding_of_tiles_is_moved_too():
    # 64 of 128 lanes are used, of which the ruler must tell.
    text = "\nENTRY %main {\n  %a = bf16[8,1024,64]{2,1,0:T(8,128)(2,1)} parameter(0)\n"
    text += "  %b = f32[3,5]{1,0:T(8,128)S(1)} custom-call(%a), x\n"
    text += "  %c = f32[3,5]{1,0:T(8,128)} copy(%b), x\n"
    traffic = moved_bytes(text)
    assert {name: size for size, _, name in traffic.rows} == {
        "b": 8 * 1024 * 128 * 2,
        "c": 8 * 128 * 4,
    }


def test_what_is_fetched_for_the_next_run_is_not_moved_twice():
    text = "\nENTRY %main {\n  %a = f32[8,1024]{1,0:T(8,128)} parameter(0)\n"
    for n in ("", ".1"):
        made = "f32[8,1024]{1,0:T(8,128)S(1)}, f32[8,1024]{1,0:T(8,128)}, u32[]{:S(2)}"
        text += f"  %copy-start{n} = ({made}) copy-start(%a)\n"
        text += f"  %copy-done{n} = f32[8,1024]{{1,0:T(8,128)S(1)}} copy-done(%copy-start{n})\n"
        if not n:
            text += "  ROOT %b = f32[8,1024]{1,0:T(8,128)} negate(%copy-done)\n"
    assert sorted(name for _, _, name in moved_bytes(text).rows) == ["b", "copy-start"]


def test_a_loop_is_told():
    def loop(x):
        return jax.lax.fori_loop(0, 10, lambda i, x: jnp.sin(x @ x), x)

    assert moved_bytes(compile_for("v6e:2x2", loop, shape(512, 512))).loops


@pytest.fixture(scope="module")
def probed() -> dict[str, Program]:
    B, T, H = 4, 2048, 128
    bounds = np.stack([np.zeros(8), np.arange(8)]).astype(np.int32)
    arrays = (shape(B, T, H), shape(B, T, H))
    unknown = Job("v6e", probe, (shape(2, 8, dtype=jnp.int32), *arrays))
    jobs = [Job(chip, probe, (bounds, *arrays)) for chip in ("v6e", "v5e", "v5p")]
    found = list(programs([*jobs, unknown]))
    assert all(isinstance(p, Program) for p in found), found
    return dict(zip(("v6e", "v5e", "v5p", "unknown"), found, strict=True))  # pyright: ignore


def times(run: bundles.Run) -> set[int]:
    return set(run.counts.tolist())


@pytest.mark.parametrize("chip", ["v6e", "v5e", "v5p"])
def test_loops_and_guards_run_as_often_as_they_do(probed, chip):
    (run,) = probed[chip].runs
    tiles, thirds = 4 * sum(range(8)), 4 * sum(-(-n // 3) for n in range(8))
    assert {tiles, thirds, 4 * 8} <= times(run)
    assert max(times(run)) == tiles


@pytest.mark.parametrize("chip", ["v6e", "v5e", "v5p"])
def test_copies_are_counted_with_what_is_read_again(probed, chip):
    (run,) = probed[chip].runs
    x = y = 4 * 2048 * 128 * 2
    out = 4 * 2048 * 256 * 2
    assert x + y + out <= run.moved <= x + y + out + 8192  # and the bounds


def test_cycles_are_plausible(probed):
    (run,) = probed["v6e"].runs
    best = 4 * sum(range(8)) * 256 * 128 * 256 / (2 * 256 * 256)  # two MXUs of 256 x 256
    assert best < run.cycles < 50 * best
    assert 0 < run.share["MXU"] < 1
    (kernel,) = probed["v6e"].kernels
    assert sum(r.bundles for r in kernel.regions()) == len(kernel.use)
    assert max(r.share["MXU"] for r in kernel.regions()) > run.share["MXU"]


def test_what_depends_on_data_that_is_not_given_is_told(probed):
    assert "Unknown" in probed["unknown"].runs[0]
    assert probed["unknown"].cycles is None


def test_steering_computes_the_integers_and_nothing_else():
    bounds = np.arange(16, dtype=np.int32).reshape(2, 8)
    big = shape(4, 2**20, 128)  # would not be computed in time
    fn = jax.jit(lambda b, x: probe(b * 2, jnp.cumsum(x, 1), x))
    ((name, known),) = steering(Job("v6e", fn, (bounds, big)))
    assert name == "probe"
    np.testing.assert_array_equal(known[0], bounds * 2)


@pytest.mark.parametrize("side", ["splash", pytest.param("flash", marks=pytest.mark.slow)])
def test_jaxs_own_cost_what_is_known_of_them(side):
    one = attention_tpu.Shape(1024, 64)
    make = {"splash": rivals.splash_with(1024, (1024,) * 3), "flash": rivals.flash(1024)}
    (program,) = programs([Job("v6e", *attention_tpu.theirs(one, make[side], backward=False))])
    assert isinstance(program, Program), program
    told = attention_tpu.cycles(program, "v6e", one, backward=False)
    assert 3_200 < told["cycles_a_head"] < 3_700, told
    assert 0.5 < told["MXU"] < 0.7
    assert all(2**20 < used < 2**26 for used in told["vmem"])


def test_a_job_that_fails_is_a_reason_and_the_next_goes_on():
    def fails(x):
        raise NotImplementedError("not this one")

    jobs = [Job("v6e", fails, (shape(8, 128),)), Job("v6e", jnp.sin, (shape(8, 128),))]
    reason, program = programs(jobs)
    assert isinstance(reason, str) and "not this one" in reason
    assert isinstance(program, Program) and program.kernels == []


def test_the_command_writes_what_the_table_reads(tmp_path):
    file = tmp_path / "cpu" / "attention.json"
    command = [sys.executable, "-m", "evaluate.speed", "attention", "--ruler", "cpu"]
    command += ["--quick", "--rounds", "1", "--add", "--json", str(file)]
    file.parent.mkdir()
    file.write_text('{"an earlier": "run"}')
    subprocess.run(command, check=True, capture_output=True)
    earlier, found = json.loads(file.read_text())
    assert earlier == {"an earlier": "run"}
    assert {row["side"] for row in found["timed"]} == {"auto", "chunked", "reference"}
    assert "| 256 |" in table.markdown(found) and "| 16384 |" in table.markdown(found)
    sizes = {(row["T"], row["side"]): row["temporaries"] for row in found["sized"]}
    assert sizes[16_384, "auto"] * 5 < sizes[16_384, "reference"]


@pytest.mark.slow
def test_a_process_of_chunks_takes_less_memory_than_one_of_all_logits():
    logits = 4 * 1024**2 * attention.HEADS
    chunks, dense = (attention.process(impl, 1024) for impl in ("chunked", "reference"))
    assert dense > 3 * logits and chunks < dense - 2 * logits


def test_cpu_seconds_and_processes_have_their_words():
    row = {"T": 1024, "side": "auto", "median_ms": 7.0, "process": 3 * 2**20}
    run = {"ruler": "cpu", "clock": "cpu", "timed": [row], "sized": []}
    told = table.markdown(ABOUT | run)
    assert "by CPU seconds" in told and "A process, MiB" in told and "| 1024 | 3 |" in told


CASE = {"chip": "v6e", "T": 1024, "H": 64, "side": "ours", "backward": True}
PARTS = {
    "layers": ({"fused": False, "X": 30.0}, "| v6e | 64 | 1024 | yes | plain | 30 |  |  |"),
    "kernels": ({"cycles_a_head": 2176.4}, "| v6e | 64 | 1024 | yes | 2,176 |  |  |  |"),
    "masks": ({"mask": "prefix", "price": 1.41}, "| prefix | v6e | 64 | yes | 1.41 |  |"),
}
ABOUT = {"hardware": {"device": "cpu", "jax": "0"}, "command": "", "commit": ""}


@pytest.mark.parametrize("parts", [["layers"], ["kernels"], ["masks"], [*PARTS]], ids=str)
def test_the_parts_that_were_measured_are_tables(parts):
    rows = {part: [CASE | PARTS[part][0]] for part in parts}
    told = table.markdown(ABOUT | {"ruler": "tpu", "libtpu": "0"} | rows)
    assert told.count("\n|---") == len(parts)
    assert all(PARTS[part][1] in told.splitlines() for part in parts)


def test_runs_add_up_and_the_last_of_a_case_counts():
    about = ABOUT | {"ruler": "tpu", "libtpu": "0"}
    first = [CASE | {"fused": False, "X": 31.0}, CASE | {"fused": True, "X": 32.0}]
    runs = [about | {"layers": first}, about | {"layers": [CASE | PARTS["layers"][0]]}]
    told = table.markdown(runs).splitlines()
    assert [line for line in told if line.startswith("| v6e")] == [
        PARTS["layers"][1], "| v6e | 64 | 1024 | yes | norm, rotary | 32 |  |  |",
    ]  # fmt: skip


MEASURED = pathlib.Path(__file__).parents[2] / "docs" / "measured"


@pytest.mark.parametrize(
    "file", sorted(MEASURED.rglob("attention*.json")), ids=lambda f: f.stem
)
def test_what_was_measured_is_read(file):
    assert "\n|---" in table.markdown(json.loads(file.read_text()))


def test_a_file_that_is_no_table_is_told(tmp_path, monkeypatch, capsys):
    path = tmp_path / "none.json"
    monkeypatch.setattr(sys, "argv", ["table", str(path)])
    assert table.main() == 2
    assert f"{path}: is no file of" in capsys.readouterr().err
    path.write_text("x")
    with pytest.raises(InputError, match="holds no runs"):
        held(path)
