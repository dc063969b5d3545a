"""Random calls of the C++ kernels against float64. BSSN_FAST_FUZZ=50 tries fifty times as many as usual."""

import dataclasses

import matrix
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bssn_fast.backends import extension

if extension.module is None:
    pytest.skip(str(extension.why_missing()), allow_module_level=True)

NATIVE = extension.module.cpu_instruction_set()
INSTRUCTION_SETS = [s for s in ("avx512", "avx2", "portable") if extension.module.cpu_set_instruction_set(s)]
extension.module.cpu_set_instruction_set(NATIVE)

DTYPES = [
    (torch.float64, torch.float64),
    *((weight, result) for weight in matrix.HALVES for result in (*matrix.HALVES, torch.float32, torch.float64)),
    *((torch.float32, result) for result in (*matrix.HALVES, torch.float32, torch.float64)),
]


def any_shape(channels, kernel):
    return st.builds(
        lambda c, k: (*c, *k),
        st.tuples(st.integers(1, channels), st.integers(1, channels)),
        st.lists(st.integers(1, kernel), max_size=3).map(tuple),
    )


SHAPES = st.one_of(
    any_shape(70, 6),
    any_shape(9, 20),
    st.tuples(st.integers(1, 3), st.integers(1, 40000)),  # long rows
    st.tuples(st.integers(1, 3), st.integers(1, 6), st.integers(1000, 20000)),  # long kernels
    st.tuples(st.integers(1, 3), st.integers(4000, 12000), st.integers(2, 5)),
    st.tuples(st.integers(1, 9000), st.integers(1, 4)),  # many rows
).flatmap(lambda shape: st.sampled_from([shape, (shape[1], shape[0], *shape[2:])]))

CALLS = st.builds(
    matrix.Case,
    shapes=st.lists(SHAPES, min_size=1, max_size=4).map(tuple),
    memory=st.sampled_from([*matrix.MEMORY, "shuffled"]),
    both=st.booleans(),
    n_power_iterations=st.integers(0, 3),
    dims=st.lists(st.integers(0, 1), min_size=4, max_size=4).map(tuple),
    offset=st.integers(0, 5),
    magnitude=st.sampled_from([1e-6, 1.0, 1e4]),
    seed=st.integers(0, 1000),
)


@given(CALLS, st.sampled_from(DTYPES), st.integers(2, 7), st.sampled_from(INSTRUCTION_SETS))
def test_fuzz(case, dtypes, threads, instruction_set):
    """The error stays in bounds, and the bits are the same for any number of threads."""
    weight_dtype, result_dtype = dtypes
    case = dataclasses.replace(
        case,
        weight_dtype=weight_dtype,
        result_dtype=result_dtype,
        dims=case.dims[: len(case.shapes)],
        magnitude=1.0 if torch.float16 in dtypes else case.magnitude,
    )
    extension.module.cpu_set_instruction_set(instruction_set)
    try:
        one = matrix.check("cpu", case, more_units=12)  # sums of 1024 rows: up to a third of that number's root
        x = matrix.inputs(case)  # by torch, whose bits may depend on the number of threads
        torch.set_num_threads(threads)
        many = matrix.run("cpu", case, x)
    finally:
        torch.set_num_threads(1)
        extension.module.cpu_set_instruction_set(NATIVE)
    for part in dataclasses.fields(matrix.Results):
        for a, b in zip(getattr(one, part.name), getattr(many, part.name), strict=True):
            assert matrix.same_bits(a, b), part.name
