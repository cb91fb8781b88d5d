"""`install_as_segment_anything`, each time in a process of its own, as third-party code would meet it."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


def run(code: str, *, path: Path | None = None) -> subprocess.CompletedProcess[str]:
    environment = dict(os.environ)
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), environment.get("PYTHONPATH", "")])
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=environment, cwd=ROOT)


def check(code: str, **keywords) -> str:
    result = run(code, **keywords)
    assert result.returncode == 0, result.stderr
    return result.stdout


THIRD_PARTY = """
import sam_fast
sam_fast.install_as_segment_anything()
sam_fast.install_as_segment_anything()

import segment_anything
import segment_anything.utils.amg as amg
from segment_anything import (
    SamAutomaticMaskGenerator, SamPredictor, build_sam, build_sam_vit_b, build_sam_vit_h, build_sam_vit_l,
    sam_model_registry,
)
from segment_anything.automatic_mask_generator import SamAutomaticMaskGenerator as Generator
from segment_anything.build_sam import build_sam as build
from segment_anything.modeling import ImageEncoderViT, MaskDecoder, PromptEncoder, Sam, TwoWayTransformer
from segment_anything.modeling import common
from segment_anything.modeling.common import LayerNorm2d, MLPBlock
from segment_anything.modeling.image_encoder import ImageEncoderViT as Encoder
from segment_anything.modeling.mask_decoder import MaskDecoder as Decoder
from segment_anything.modeling.prompt_encoder import PromptEncoder as Prompts
from segment_anything.modeling.sam import Sam as SamClass
from segment_anything.modeling.transformer import TwoWayTransformer as Transformer
from segment_anything.predictor import SamPredictor as Predictor
from segment_anything.utils import transforms
from segment_anything.utils.amg import MaskData, remove_small_regions
from segment_anything.utils.onnx import SamOnnxModel
from segment_anything.utils.transforms import ResizeLongestSide

import sam_fast.modeling.sam, sam_fast.utils.onnx
assert segment_anything is sam_fast
assert Generator is SamAutomaticMaskGenerator is sam_fast.SamAutomaticMaskGenerator
assert Predictor is SamPredictor is sam_fast.SamPredictor and build is build_sam is sam_fast.build_sam
assert Encoder is ImageEncoderViT and Decoder is MaskDecoder
assert Prompts is PromptEncoder and Transformer is TwoWayTransformer
assert common.LayerNorm2d is LayerNorm2d is sam_fast.modeling.layers.LayerNorm2d
assert SamClass is Sam is sam_fast.modeling.Sam is sam_fast.modeling.sam.Sam
assert SamOnnxModel is sam_fast.utils.onnx.SamOnnxModel
assert amg.MaskData is MaskData is sam_fast.utils.amg.MaskData
assert transforms.ResizeLongestSide is ResizeLongestSide
assert set(sam_model_registry) == {"default", "vit_h", "vit_l", "vit_b", "nano"}
# The modules still know themselves by their own names.
assert sam_fast.__spec__.name == sam_fast.__name__ == "sam_fast"
assert sam_fast.modeling.sam.__spec__.name == sam_fast.modeling.sam.__name__ == "sam_fast.modeling.sam"
"""


def test_third_party_imports_get_sam_fast():
    check(THIRD_PARTY)


def test_a_module_nobody_listed_is_not_executed_twice():
    check(
        "import sam_fast; sam_fast.install_as_segment_anything()\n"
        "import segment_anything.preprocess as alias, sam_fast.preprocess as ours\n"
        "assert alias is ours"
    )


def test_a_module_we_lack_is_an_ordinary_import_error():
    check(
        "import importlib.util, sam_fast; sam_fast.install_as_segment_anything()\n"
        "assert importlib.util.find_spec('segment_anything') is not None\n"
        "assert importlib.util.find_spec('segment_anything.missing') is None\n"
        "try:\n    import segment_anything.missing\n"
        "except ModuleNotFoundError as error:\n    assert error.name == 'segment_anything.missing'\n"
        "else:\n    raise AssertionError"
    )


def test_pickled_references_resolve_to_sam_fast():
    check(
        "import pickle, sam_fast; sam_fast.install_as_segment_anything()\n"
        "official = b'csegment_anything.modeling.sam\\nSam\\n.'\n"
        "assert pickle.loads(official) is sam_fast.modeling.sam.Sam"
    )


@pytest.fixture
def other_package(tmp_path) -> Path:
    """A directory with another package that is called segment_anything."""
    package = tmp_path / "segment_anything"
    package.mkdir()
    (package / "__init__.py").write_text("somebody_else = True\n")
    (package / "extra.py").write_text("")
    return tmp_path


def test_an_installed_segment_anything_is_hidden(other_package):
    check(
        "import sam_fast; sam_fast.install_as_segment_anything()\n"
        "import segment_anything\n"
        "assert segment_anything is sam_fast and not hasattr(segment_anything, 'somebody_else')\n"
        "try:\n    import segment_anything.extra\n"
        "except ModuleNotFoundError:\n    pass\n"
        "else:\n    raise AssertionError",
        path=other_package,
    )


def test_a_segment_anything_that_is_imported_already_is_an_error(other_package):
    result = run("import segment_anything, sam_fast; sam_fast.install_as_segment_anything()", path=other_package)
    assert result.returncode != 0
    assert "RuntimeError: segment_anything is imported already, from " + str(other_package) in result.stderr
    assert "before anything imports it" in result.stderr


def test_nothing_is_hidden_until_it_is_called(other_package):
    check("import sam_fast, segment_anything; assert segment_anything.somebody_else", path=other_package)


def test_a_predictor_made_through_the_alias_predicts():
    output = check(
        "import sys; sys.path.insert(0, '.')\n"
        "import sam_fast; sam_fast.install_as_segment_anything()\n"
        "import numpy as np\n"
        "from segment_anything import SamPredictor\n"
        "from sam_fast import SamConfig, build_sam_from_config\n"
        "config = SamConfig(\n"
        "    image_size=64, embed_dim=32, depth=1, num_heads=2, window_size=2, global_attn_indexes=(0,)\n"
        ")\n"
        "predictor = SamPredictor(build_sam_from_config(config))\n"
        "predictor.set_image(np.zeros((30, 40, 3), np.uint8))\n"
        "masks, scores, logits = predictor.predict(np.array([[5, 5]]), np.array([1]))\n"
        "print(masks.shape, masks.dtype, scores.shape, logits.shape)"
    )
    assert output.strip() == "(3, 30, 40) bool (3,) (3, 16, 16)"
