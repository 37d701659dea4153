"""Who joins others: as the surroundings tell, and as JAX finds out where they do not."""

import subprocess
import sys

import jax
import pytest

from jaxformer import hosts
from jaxformer.errors import InputError

TOLD = ("SLURM_NTASKS", "OMPI_COMM_WORLD_SIZE", "MEGASCALE_NUM_SLICES")
GKE = ("TPU_PROCESS_ADDRESSES", "TPU_WORKER_HOSTNAMES")
NO_TPU, TPU = False, True
CASES = {  # Surroundings, whether TPUs are here, whether JAX is asked to join.
    "a desk": ({}, NO_TPU, False),
    "one task": ({"SLURM_NTASKS": "1"}, TPU, False),
    "a cluster": ({"SLURM_NTASKS": "4"}, NO_TPU, True),
    "mpirun": ({"OMPI_COMM_WORLD_SIZE": "2"}, NO_TPU, True),
    "a Cloud TPU VM": ({}, TPU, True),  # Its metadata know the others.
    "GKE, one host": ({"TPU_WORKER_HOSTNAMES": "localhost"}, TPU, False),
    "GKE, two hosts": ({"TPU_WORKER_HOSTNAMES": "a,b"}, TPU, True),
    "GKE, addresses": ({"TPU_PROCESS_ADDRESSES": "a:8471,b:8471"}, TPU, True),
    "slices of one host": (
        {"TPU_WORKER_HOSTNAMES": "localhost", "MEGASCALE_NUM_SLICES": "2"},
        TPU,
        True,
    ),
    "a sentence": (
        {"TPU_WORKER_HOSTNAMES": "WARNING: could not, be determined"},
        NO_TPU,
        False,
    ),
}


@pytest.fixture
def around(monkeypatch):
    def around(environment, tpu, answer=None):
        for name in (*TOLD, *GKE):
            monkeypatch.delenv(name, raising=False)
        for name, value in environment.items():
            monkeypatch.setenv(name, value)
        asked = []

        def initialize(*args, **options):
            asked.append(args)
            if answer is not None:
                raise answer

        monkeypatch.setattr(hosts, "_on_a_tpu", lambda: tpu)
        monkeypatch.setattr(jax.distributed, "initialize", initialize)
        return asked

    return around


@pytest.mark.parametrize("name", CASES)
def test_who_joins(name, around):
    environment, tpu, joins = CASES[name]
    asked = around(environment, tpu)
    hosts.join()
    assert asked == ([()] if joins else [])


def test_a_tpu_that_nobody_is_beside_is_alone_and_a_cluster_is_not(around):
    nobody = ValueError(f"{hosts._NOBODY}.")
    around({}, TPU, nobody)
    hosts.join()
    for environment, error in (({}, RuntimeError("metadata")), ({"SLURM_NTASKS": "2"}, nobody)):
        around(environment, TPU, error)
        with pytest.raises(InputError, match="the other processes were not found"):
            hosts.join()


def test_this_is_what_jax_says_where_nobody_is():
    code = "import jax; jax.distributed.initialize()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={"JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
    )
    assert done.stderr.splitlines()[-1] == f"ValueError: {hosts._NOBODY}."
