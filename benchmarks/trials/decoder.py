"""The decoder: its kernels over an image's pixels by launch parameters, and the whole of it by prompts at a time."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from unittest import mock

import torch
from sam_fast.kernels import two_way_attention as write_kernels
from sam_fast.kernels import two_way_read as read_kernels
from sam_fast.kernels import upscale_masks as upscale_kernels
from sam_fast.kernels.launch import architecture
from torch import Tensor

from benchmarks.device_timing import measure
from benchmarks.gpu_sections import clicks, set_image
from benchmarks.peers import CONFIGS, build_ours
from benchmarks.trials.run import Run
from benchmarks.trials.timing import error_of, randn
from benchmarks.trials.variants import Case, Functions, launches, measure_cases, replaceable
from sam_fast import SamPredictor
from sam_fast.ops.two_way_attention import HEADS, Write, two_way_attention, two_way_attention_reference
from sam_fast.ops.upscale_masks import Upscaling, upscale_masks, upscale_masks_reference
from sam_fast.runtime import decoding
from sam_fast.runtime.inference import Prompts

AT_A_TIME = (64, 128, 256, 512)  # prompts
_TOKENS = 7  # of a click: its own two, one of the predicted IoU, four of masks
_ROWS = _TOKENS * HEADS
_programs_at_a_time = write_kernels.programs_at_a_time


def try_decoder(run: Run) -> None:
    """Kernels with random numbers, then the first model's decoder."""
    config = CONFIGS[run.models[0]]
    side, C, count = config.image_size // config.patch_size, config.prompt_embed_dim, run.prompts[0]
    modules = write_kernels, read_kernels, upscale_kernels
    names = "write_launch", "read_launch", "upscale_launch"
    functions = [*zip(modules, names, strict=True)]
    functions += [(module, "programs_at_a_time") for module in (write_kernels, upscale_kernels)]
    with replaceable(*functions):
        images = [randn(run.device, count, side * side, C, seed=seed) for seed in range(2)]
        cases = [*_write_cases(images), _read_case(images)]
        cases += [_upscale_case(images, side, dtype) for dtype in (torch.float16, torch.bfloat16)]
        measure_cases(run, "decoder", cases)
        del images, cases
    if not all(run.has_begun(_name(most)) for most in AT_A_TIME):
        _try_prompts_at_a_time(run)


def _write_cases(images: list[Tensor]) -> list[Case]:
    """Pixels take from tokens: of images of their own, and of the image that all prompts begin with."""
    N, P, C = images[0].shape
    device, d = images[0].device, C // (2 * HEADS)
    pe = randn(device, P, C, seed=5)
    bias, norm_weight, norm_bias = (randn(device, C, dtype=torch.float32, seed=seed) for seed in (7, 8, 9))
    offered = randn(device, N, _ROWS, C, scale=0.3, seed=6)
    keys = randn(device, N, _ROWS, C, scale=C**-0.5, seed=10).mT
    constant = randn(device, N, _ROWS, dtype=torch.float32, seed=11)
    absorbed = Write(offered, bias.bfloat16(), norm_weight, norm_bias, 1e-5, absorbed_keys=keys, constant=constant)
    queries = randn(device, P, d, HEADS, seed=12)
    keys_of_heads = randn(device, N, _TOKENS, d, HEADS, scale=d**-0.5, seed=13)
    projected = absorbed._replace(absorbed_keys=None, constant=None, queries=queries, keys=keys_of_heads)

    present = write_kernels.write_launch(architecture(device), torch.bfloat16, write_kernels.padded(_ROWS))
    variants = launches("write_launch", present, {"pixels": 2 * present.pixels, "warps": 8}) | _programs(2, 4)

    def case(name: str, write: Write, sources: list[Tensor], work: int) -> Case:
        def take(image: Tensor) -> Tensor:
            return two_way_attention(image, pe, write, None, HEADS, backend="triton")[0]

        def error(got: Tensor) -> float:
            image = sources[0].float().expand(N, -1, -1)
            return error_of(got, two_way_attention_reference(image, pe, write, None, HEADS)[0])

        calls = [partial(take, image) for image in sources]
        return Case(f"{name}, {N} prompts", work, "TB/s", calls, error, variants)

    nbytes = images[0].nbytes
    return [
        case("write", absorbed, images, 2 * nbytes),
        case("write, one image", projected, [image[:1] for image in images], nbytes),
    ]


def _read_case(images: list[Tensor]) -> Case:
    """Tokens read pixels."""
    N, P, C = images[0].shape
    device = images[0].device
    pe, queries = randn(device, P, C, seed=5), randn(device, N, _ROWS, C, scale=C**-0.5, seed=14).mT

    def read(image: Tensor) -> Tensor | None:
        return two_way_attention(image, pe, None, queries, HEADS, backend="triton")[1]

    def error(got: Tensor) -> float:
        expected = two_way_attention_reference(images[0].float(), pe, None, queries, HEADS)[1]
        assert expected is not None
        return error_of(got, expected)

    present = read_kernels.read_launch(architecture(device), torch.bfloat16, write_kernels.padded(_ROWS))
    variants = launches("read_launch", present, {"pixels": present.pixels // 2}) | _programs(0.5, 2)
    calls = [partial(read, image) for image in images]
    return Case(f"read, {N} prompts", images[0].nbytes, "TB/s", calls, error, variants)


def _upscale_case(images: list[Tensor], side: int, dtype: torch.dtype) -> Case:
    """From pixels to the logits of three masks per prompt."""
    N, P, C = images[0].shape
    device, C1, C2 = images[0].device, C // 4, C // 8
    weights = Upscaling(
        first_weight=randn(device, 4 * C1, C, scale=C**-0.5, seed=15).to(dtype),
        first_bias=randn(device, C1, seed=16).to(dtype),
        norm_weight=randn(device, C1, dtype=torch.float32, seed=17),
        norm_bias=randn(device, C1, dtype=torch.float32, seed=18),
        eps=1e-6,
        second_weight=randn(device, 4 * C2, C1, scale=0.1, seed=19).to(dtype),
        second_bias=randn(device, C2, seed=20).to(dtype),
    )
    classifiers = randn(device, N, 3, C2, dtype=torch.float32, seed=21)
    squares = [image.to(dtype).unflatten(1, (side, side)) for image in images]

    def error(got: Tensor) -> float:
        return error_of(got, upscale_masks_reference(squares[0].float(), weights, classifiers))

    present = upscale_kernels.upscale_launch(architecture(device), dtype)
    changes = {"warps": 4}, {"pixels": present.pixels // 2, "warps": 4}
    variants = launches("upscale_launch", present, *changes) | _programs(0.5, 2)
    calls = [partial(upscale_masks, image, weights, classifiers, backend="triton") for image in squares]
    work = images[0].nbytes + 4 * N * 3 * 16 * P
    name = f"upscale{'' if dtype == torch.float16 else ' in bf16'}, {N} prompts"
    return Case(name, work, "TB/s", calls, error, variants)


def _programs(*factors: float) -> dict[str, Functions]:
    """Variants with so many times the present number of programs."""

    def programs(factor: float) -> Callable[[torch.device], int]:
        return lambda device: max(1, int(factor * _programs_at_a_time(device)))

    return {f"programs x {factor}": {"programs_at_a_time": programs(factor)} for factor in factors}


def _name(most: int) -> str:
    return f"decoder: {most} prompts at a time"


def _try_prompts_at_a_time(run: Run) -> None:
    """The whole decoder, for all prompts and for those with a mask above the median of predicted IoUs."""
    name, count = run.models[0], run.prompts[-1]
    model = build_ours(name, run.device)
    state = set_image(model, run.size)
    runtime = SamPredictor(model, precision=run.precisions[0]).runtime
    embedding = runtime.adopt(state.features, state.original_size, state.input_size)
    prompts = [Prompts(*clicks(state, count, run.device, seed)) for seed in range(2)]
    threshold = runtime.decode(embedding, prompts[0])[1].median().item()
    calls = {
        "decode": lambda i: runtime.decode(embedding, prompts[i % 2]),
        "decode_filtered": lambda i: runtime.decode_filtered(embedding, prompts[i % 2], threshold),
    }

    def decode(most: int) -> None:
        with mock.patch.object(decoding, "MOST_PROMPTS", most):
            for what, call in calls.items():
                for i in range(2):  # graphs are recorded by the second call
                    call(i)
                measured = measure(call, run.device, seconds=0.2)
                milliseconds = sorted(measured.wall)[len(measured.wall) // 2]
                case = f"{what}, {count} prompts"
                peak = None if measured.peak_bytes is None else measured.peak_bytes / 1e9
                tail = "" if peak is None else f"{peak:>8.2f} GB"
                run.say(f"{'decoder':<10}{case:<34}{f'{most} at a time':<28}{1e3 * milliseconds:>9.1f} us{tail}")
                run.keep("decoder", case, [(f"{most} at a time", round(1e3 * milliseconds, 2), peak, "GB")])

    for most in AT_A_TIME:
        run.trial(_name(most), partial(decode, most))
