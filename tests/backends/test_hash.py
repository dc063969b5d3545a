"""The hash by which a change of a tensor is seen: every byte counts, in its place, on every processor."""

from array import array

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from bssn_fast.backends import cpu, extension

if extension.module is None:
    pytest.skip(str(extension.why_missing()), allow_module_level=True)

NATIVE = extension.module.cpu_instruction_set()
INSTRUCTION_SETS = [s for s in ("avx512", "avx2", "portable") if extension.module.cpu_set_instruction_set(s)]
extension.module.cpu_set_instruction_set(NATIVE)
CHUNK = 128 * 1024
DTYPES = [torch.float32, torch.float64, torch.bfloat16, torch.float16, torch.int8, torch.complex64]


@pytest.fixture(params=INSTRUCTION_SETS)
def instruction_set(request):
    assert extension.module.cpu_set_instruction_set(request.param)
    yield request.param
    extension.module.cpu_set_instruction_set(NATIVE)


def hashes_of(data, sizes, threads=1):
    """Hashes of stretches that lie one after another in a tensor of bytes."""
    starts = [data.data_ptr() + sum(sizes[:j]) for j in range(len(sizes))]
    table, out = array("q", [*starts, *sizes]), array("Q", [77] * (len(sizes) + 1))
    first, n = table.buffer_info()[0], len(sizes)
    assert extension.module.cpu_hash(first, first + 8 * n, n, threads, out.buffer_info()[0]) == 0
    assert out[-1] == 77, "written behind the end"
    return list(out[:-1])


def hash_of(data):
    return hashes_of(data, [len(data)])[0]


def random_bytes(n, offset=0):
    return torch.randint(0, 256, (n + offset,), dtype=torch.uint8)[offset:]


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("n", [1, 2, 7, 8, 33, 64, 65, 129, 270])
@pytest.mark.parametrize("offset", [0, 3])
def test_every_single_element(instruction_set, dtype, n, offset):
    room = torch.randn(n + offset).to(dtype)
    x = room[offset:]
    found = {cpu.hashes([x])}
    for j in range(n):
        old = x[j].clone()
        for new in (0 * old if old != 0 else old + 1, -old if old != 0 else old + 2):
            x[j] = new
            found.add(cpu.hashes([x]))
        x[j] = old
    assert len(found) == 2 * n + 1
    assert cpu.hashes([x]) in found


@pytest.mark.parametrize("n", [1, 5, 16, 255, 256, 257, 600])
def test_every_single_bit(instruction_set, n):
    for offset in (0, 1, 5):
        x = random_bytes(n, offset)
        found = {hash_of(x)}
        for j in range(n):
            for bit in range(8):
                x[j] ^= 1 << bit
                found.add(hash_of(x))
                x[j] ^= 1 << bit
        assert len(found) == 8 * n + 1


def test_every_length():
    """Also of zeros, and none at all."""
    zeros = torch.zeros(2000, dtype=torch.uint8)
    found = {hash_of(zeros[:n]) for n in range(2000)}
    found |= {hash_of(zeros.new_zeros(n)) for n in (CHUNK - 1, CHUNK, CHUNK + 1, 2 * CHUNK)}
    assert len(found) == 2004


def test_single_elements_of_a_large_tensor(instruction_set):
    x = torch.randn(3 * CHUNK // 4 + 5)
    first = cpu.hashes([x])
    for j in (0, 1, CHUNK // 4 - 1, CHUNK // 4, CHUNK // 2, len(x) - 6, len(x) - 5, len(x) - 1):
        old = float(x[j])
        x[j] = torch.nextafter(x[j], torch.tensor(torch.inf))
        assert cpu.hashes([x]) != first
        x[j] = old
        assert cpu.hashes([x]) == first


def changes(w):
    """Whole-tensor changes as programs make them."""
    yield from (-w, 2 * w, 4 * w, w / 2, w + 1, w + 2**-8, w.abs(), w.neg().abs(), w.relu(), w.sign(), 0 * w, w * w)
    for dim in range(w.ndim):
        size = w.shape[dim]
        for part in (slice(0, None, 2), slice(1, None, 2), slice(0, None, 4), slice(size // 2, None)):
            for change in (torch.zeros_like, torch.neg, lambda x: 2 * x, lambda x: x + 1):
                new = w.clone()
                index = (slice(None),) * dim + (part,)
                new[index] = change(new[index])
                yield new
        for shift in (1, 2, 3, size // 2):
            yield w.roll(shift, dim)
        yield w.flip(dim)
        for j in range(size - 1):  # of neighbours
            order = list(range(size))
            order[j], order[j + 1] = order[j + 1], order[j]
            yield w.index_select(dim, torch.tensor(order))
    for j in range(0, w.numel() - 3, 5):  # pairs that could cancel each other
        for k in (1, 2, 3, 32, 64, 128):
            if j + k < w.numel():
                new = w.clone()
                new.view(-1)[[j, j + k]] *= -1
                yield new


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str)
@pytest.mark.parametrize("start", ["random", "ones", "signs"])
def test_structured_changes(dtype, start):
    """All are told apart, also of weights with few different numbers."""
    w = torch.randn(16, 4, 3, 3)
    w = {"random": w, "ones": torch.ones_like(w), "signs": w.sign()}[start].to(dtype)
    by_contents, hashes = set(), set()
    for new in (w, *changes(w)):
        new = new.contiguous()
        by_contents.add(bytes(new.flatten().view(torch.uint8).tolist()))
        hashes.add(cpu.hashes([new]))
    assert len(hashes) == len(by_contents) > 200


def test_pairs_of_signs_in_one_lane():
    """The signs of two numbers in each of two words that meet in one lane: all 16 combinations differ."""
    for dtype in (torch.float16, torch.float32, torch.float64):
        per_word = 8 // dtype.itemsize
        x = torch.ones(4 * 256 // dtype.itemsize, dtype=dtype)
        found = set()
        for pattern in range(2 ** (3 * per_word)):
            y = x.clone()
            for j in range(3 * per_word):
                if pattern >> j & 1:
                    y[(j // per_word) * 256 // dtype.itemsize + j % per_word] *= -1
            found.add(cpu.hashes([y]))
        assert len(found) == 2 ** (3 * per_word)


def test_all_bits_of_a_hash_take_part():
    """Each bit is flipped by about half of the changes of a single bit, the first and the last of a tensor alike."""
    flips = torch.zeros(64)
    x = random_bytes(1000)
    first = hash_of(x)
    for j in (*range(100), *range(900, 1000)):
        for bit in range(8):
            x[j] ^= 1 << bit
            difference = hash_of(x) ^ first
            flips += torch.tensor([difference >> b & 1 for b in range(64)])
            x[j] ^= 1 << bit
    assert ((flips / 1600 - 0.5).abs() < 0.08).all()


@given(st.lists(st.integers(0, 3000) | st.integers(CHUNK - 2, 2 * CHUNK + 2), max_size=6), st.integers(0, 9))
def test_instruction_sets_and_threads_agree(sizes, offset):
    data = random_bytes(sum(sizes) + 1, offset)
    expected = hashes_of(data, sizes)
    for isa in INSTRUCTION_SETS:
        extension.module.cpu_set_instruction_set(isa)
        assert hashes_of(data, sizes) == expected
    extension.module.cpu_set_instruction_set(NATIVE)
    starts = [sum(sizes[:j]) for j in range(len(sizes))]
    assert [hash_of(data[s : s + n]) for s, n in zip(starts, sizes, strict=True)] == expected


def test_number_of_threads_does_not_matter():
    sizes = [5, 7 * CHUNK + 3, 0, CHUNK, 100, 4 * CHUNK]
    data = random_bytes(sum(sizes))
    expected = hashes_of(data, sizes)
    assert all(hashes_of(data, sizes, threads) == expected for threads in (2, 3, 7, 16))


def test_any_dense_layout():
    w = torch.randn(6, 5, 3, 3)
    same_memory = w.permute(2, 0, 3, 1)
    assert cpu.hashes([w]) == cpu.hashes([same_memory])
    last = w.to(memory_format=torch.channels_last)
    first = cpu.hashes([last, w])
    last[5, 4, 2, 2] += 1
    assert cpu.hashes([last, w])[:8] != first[:8]
    assert cpu.hashes([last, w])[8:] == first[8:]
    assert cpu.hashes([]) == b""
    assert len(cpu.hashes([torch.empty(0), torch.nn.Parameter(w)])) == 16
