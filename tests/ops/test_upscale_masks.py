"""Upscaled masks: native code against PyTorch, and PyTorch against the decoder's own layers."""

from __future__ import annotations

import pytest
import torch
from copies import Copies
from oracle import relative_error
from torch import Tensor

from sam_fast.ops.upscale_masks import Upscaling, upscale_masks, upscale_masks_reference

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"  # where Triton kernels run; on a CPU they are interpreted
TOLERANCE = 1e-5  # of float32 against float64; 5e-7 measured
BF16_TOLERANCE = 4e-3  # pixels are rounded between the convolutions; 2e-3 measured


def problem(images: int, height: int, width: int, channels: int, masks: int) -> tuple[Tensor, Upscaling, Tensor]:
    generator = torch.Generator().manual_seed(images + height + width + channels + masks)

    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, generator=generator)

    first, second = channels // 4, channels // 8
    weights = Upscaling(
        random(4 * first, channels) * channels**-0.5,
        random(first),
        1 + 0.1 * random(first),
        random(first),
        1e-6,
        random(4 * second, first) * first**-0.5,
        random(second),
    )
    return random(images, height, width, channels), weights, random(images, masks, second)


def converted(arguments: tuple[Tensor, Upscaling, Tensor], to: torch.dtype | str) -> tuple[Tensor, Upscaling, Tensor]:
    image, weights, classifiers = arguments
    weights = Upscaling(*(x.to(to) if isinstance(x, Tensor) else x for x in weights))
    return image.to(to), weights, classifiers.to(to)


def in_float64(arguments: tuple[Tensor, Upscaling, Tensor]) -> tuple[Tensor, Upscaling, Tensor]:
    return converted(arguments, torch.float64)


def device_of(backend: str) -> str:
    return DEVICE if backend == "triton" else "cpu"


SHAPES = [
    (1, 64, 64, 256, 3),
    (3, 5, 7, 256, 1),
    (2, 1, 1, 64, 4),
    (2, 6, 4, 64, 5),
    (1, 3, 8, 8, 3),
    (2, 40, 13, 64, 9),
]


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_native_equals_reference(shape, threads, monkeypatch):
    arguments = problem(*shape)
    monkeypatch.setattr("sam_fast.native.num_threads", lambda: threads)
    logits = upscale_masks(*arguments, backend="native")
    expected = upscale_masks_reference(*in_float64(arguments))
    assert logits.shape == (shape[0], shape[4], 4 * shape[1], 4 * shape[2])
    assert relative_error(logits.double(), expected) <= TOLERANCE


@pytest.mark.parametrize("biases", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("shape", [shape for shape in SHAPES if shape[3] % 16 == 0], ids=str)
def test_native_in_bfloat16(shape, threads, biases, monkeypatch):
    arguments = in_bfloat16(problem(*shape), biases)
    monkeypatch.setattr("sam_fast.native.num_threads", lambda: threads)
    logits = upscale_masks(*arguments, backend="native")
    expected = upscale_masks_reference(*in_float64(arguments))
    assert logits.dtype == torch.float32 and logits.shape == expected.shape
    assert relative_error(logits.double(), expected) <= BF16_TOLERANCE


def test_bfloat16_that_has_no_pairs_is_left_to_pytorch():
    C1, C2 = 3, 4
    weights = Upscaling(
        torch.randn(4 * C1, 16), *(torch.ones(C1) for _ in range(3)), 1e-6, torch.randn(4 * C2, C1), torch.ones(C2)
    )
    arguments = in_bfloat16((torch.randn(1, 2, 3, 16), weights, torch.randn(1, 2, C2)), torch.float32)
    with pytest.raises(ValueError, match="even number"):
        upscale_masks(*arguments, backend="native")
    assert torch.equal(upscale_masks(*arguments), upscale_masks(*arguments, backend="torch"))


def in_bfloat16(arguments: tuple[Tensor, Upscaling, Tensor], others: torch.dtype) -> tuple[Tensor, Upscaling, Tensor]:
    """What is multiplied in bfloat16, biases and all else in `others`."""
    image, weights, classifiers = converted(arguments, others)
    first, second = weights.first_weight.bfloat16(), weights.second_weight.bfloat16()
    return image.bfloat16(), weights._replace(first_weight=first, second_weight=second), classifiers


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_not_a_number_stays_in_its_square(dtype):
    image, weights, classifiers = converted(problem(1, 6, 5, 64, 3), dtype)
    clean = upscale_masks(image, weights, classifiers, backend="native")
    image[0, 2, 3, 7] = torch.nan
    logits = upscale_masks(image, weights, classifiers, backend="native")
    square = torch.zeros(24, 20, dtype=torch.bool)
    square[8:12, 12:16] = True
    assert logits[..., square].isnan().all()
    assert torch.equal(logits[..., ~square], clean[..., ~square])


@pytest.mark.parametrize("backend", ["native", "triton"])
def test_nothing(backend):
    image, weights, classifiers = converted(problem(2, 6, 5, 64, 3), device_of(backend))
    assert upscale_masks(image[:0], weights, classifiers[:0], backend=backend).shape == (0, 3, 24, 20)
    assert upscale_masks(image, weights, classifiers[:, :0], backend=backend).shape == (2, 0, 24, 20)


def test_bad_input():
    image, weights, classifiers = problem(2, 6, 5, 64, 3)
    with pytest.raises(ValueError, match="classifiers"):
        upscale_masks(image, weights, classifiers[:1])
    with pytest.raises(ValueError, match="float32"):
        upscale_masks(*in_float64((image, weights, classifiers)), backend="native")
    with pytest.raises(ValueError, match="wrong size"):
        upscale_masks(image, weights._replace(second_bias=weights.second_bias[:-1]), classifiers, backend="native")
    image.requires_grad_()
    with pytest.raises(RuntimeError, match="inference-only"):
        upscale_masks(image, weights, classifiers)
    upscale_masks(image, weights, classifiers, backend="torch").sum().backward()
    assert image.grad is not None and image.grad.abs().sum() > 0


@pytest.mark.parametrize("backend", ["native", "torch", "triton"])
def test_operator_is_registered_well(backend):
    image, weights, classifiers = converted(problem(2, 3, 4, 64, 3), device_of(backend))
    rows = torch.tensor([[2, 0, 1], [5, 3, 4]], dtype=torch.int32, device=image.device)
    for chosen in (None, rows):
        torch.library.opcheck(torch.ops.sam_fast.upscale_masks.default, (image, *weights, classifiers, chosen, backend))


@pytest.mark.parametrize("backend", ["native", "torch", "triton"])
def test_rows_name_the_masks_that_are_wanted(backend):
    image, weights, classifiers = converted(problem(3, 3, 5, 64, 3), device_of(backend))
    every = upscale_masks(image, weights, classifiers, backend=backend)
    rows = torch.tensor([[-1, 4, -1], [-1, -1, -1], [0, -1, 1]], dtype=torch.int32, device=image.device)
    image[1] = torch.nan  # nobody looks
    logits = upscale_masks(image, weights, classifiers, rows, backend=backend)
    assert logits.shape == (9, 12, 20)
    for row, mask in ((4, every[0, 1]), (0, every[2, 0]), (1, every[2, 2])):
        torch.testing.assert_close(logits[row], mask)


@pytest.mark.parametrize("backend", ["native", "torch", "triton"])
def test_masks_are_written_where_they_are_wanted(backend):
    image, weights, classifiers = converted(problem(3, 3, 5, 64, 2), device_of(backend))
    every = upscale_masks(image, weights, classifiers, backend=backend)
    room = torch.full((8, 2, 12, 20), 7.0, device=image.device)
    with Copies(12, 20) as copies:
        assert (
            upscale_masks(image, weights, classifiers, out=room[2:5], backend=backend).data_ptr() == room[2].data_ptr()
        )
    assert backend == "torch" or copies.nbytes == 0
    torch.testing.assert_close(room[2:5], every)
    assert (room[:2] == 7).all() and (room[5:] == 7).all()

    room.fill_(7.0)
    rows = torch.tensor([[15, -1], [-1, -1], [3, 9]], dtype=torch.int32, device=image.device)
    upscale_masks(image, weights, classifiers, rows, out=room.flatten(0, 1), backend=backend)
    for row, mask in ((15, every[0, 0]), (3, every[2, 0]), (9, every[2, 1])):
        torch.testing.assert_close(room.flatten(0, 1)[row], mask)
    assert (room.flatten(0, 1)[[i for i in range(16) if i not in (3, 9, 15)]] == 7).all()


@pytest.mark.parametrize("backend", ["native", "torch", "triton"])
def test_operator_that_writes_is_registered_well(backend):
    image, weights, classifiers = converted(problem(2, 3, 4, 64, 3), device_of(backend))
    rows = torch.tensor([[2, 0, 1], [9, 3, -1]], dtype=torch.int32, device=image.device)
    operator = torch.ops.sam_fast.upscale_masks_into.default
    for out, chosen in (((2, 3, 12, 16), None), ((10, 12, 16), rows)):
        room = torch.zeros(*out, device=image.device)
        torch.library.opcheck(operator, (room, image, *weights, classifiers, chosen, backend))


def test_bad_room():
    image, weights, classifiers = problem(2, 3, 5, 64, 3)
    rows = torch.zeros(2, 3, dtype=torch.int32)
    room = torch.empty(2, 3, 12, 20)
    for out in (room[:1], room.double(), room.mT.contiguous().mT, room.flatten(0, 1)):
        with pytest.raises(ValueError, match=r"out must be contiguous torch.float32 \[2, 3, 12, 20\]"):
            upscale_masks(image, weights, classifiers, out=out)
    with pytest.raises(ValueError, match=r"out must be contiguous torch.float32 \[2, 12, 20\]"):
        upscale_masks(image, weights, classifiers, rows, out=room)


def test_bad_rows():
    image, weights, classifiers = problem(2, 3, 5, 64, 3)
    for rows in (torch.zeros(2, 2, dtype=torch.int32), torch.zeros(2, 3)):
        with pytest.raises(ValueError, match="rows must be int32"):
            upscale_masks(image, weights, classifiers, rows)


def test_bad_input_of_triton():
    image, weights, classifiers = converted(problem(2, 3, 5, 64, 3), DEVICE)
    with pytest.raises(ValueError, match="float64"):
        upscale_masks(*in_float64((image, weights, classifiers)), backend="triton")
    with pytest.raises(ValueError, match="got 64, 17"):
        upscale_masks(image, weights, classifiers[:, :1].repeat(1, 17, 1), backend="triton")
    with pytest.raises(ValueError, match="classifiers have the wrong size"):
        upscale_masks(image, weights, classifiers[..., :-1], backend="triton")
    for name in ("first_bias", "norm_weight", "norm_bias", "second_weight", "second_bias"):
        changed = weights._replace(**{name: getattr(weights, name)[:-1]})
        with pytest.raises(ValueError, match=f"{name} has the wrong size"):
            upscale_masks(image, changed, classifiers, backend="triton")


def test_compiles_as_one_graph():
    arguments = problem(2, 3, 4, 64, 3)
    compiled = torch.compile(lambda *x: 2 * upscale_masks(*x), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(*arguments), 2 * upscale_masks(*arguments))


def test_compiles_as_one_graph_that_writes():
    arguments, room = problem(2, 3, 4, 64, 3), torch.zeros(3, 3, 12, 16)
    compiled = torch.compile(lambda out, *x: 2 * upscale_masks(*x, out=out[1:]), fullgraph=True, backend="aot_eager")
    torch.testing.assert_close(compiled(room, *arguments), 2 * upscale_masks(*arguments))
    torch.testing.assert_close(room[1:], upscale_masks(*arguments))
    assert (room[0] == 0).all()
