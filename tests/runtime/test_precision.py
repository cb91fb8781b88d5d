import pytest
import torch

from sam_fast.runtime import resolve_precision

CPU = torch.device("cpu")


@pytest.mark.parametrize(
    ("precision", "dtype"), [("auto", torch.float32), ("fp32", torch.float32), ("bf16", torch.bfloat16)]
)
def test_precision_on_a_cpu(precision, dtype):
    assert resolve_precision(precision, CPU) == dtype


@pytest.mark.parametrize("has_bf16", [True, False])
def test_auto_on_a_gpu_is_bf16_where_the_gpu_has_it(monkeypatch, has_bf16):
    monkeypatch.setattr(torch.cuda, "is_bf16_supported", lambda **_: has_bf16)
    assert resolve_precision("auto", torch.device("cuda")) == (torch.bfloat16 if has_bf16 else torch.float32)
    assert resolve_precision("fp16", torch.device("cuda")) == torch.float16


def test_fp16_on_a_cpu_raises():
    with pytest.raises(RuntimeError, match="CUDA device"):
        resolve_precision("fp16", CPU)


def test_unknown_precision_raises():
    with pytest.raises(ValueError, match="'int3'"):
        resolve_precision("int3", CPU)
