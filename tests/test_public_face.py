"""What `import fanformer` offers, and what it does not import."""

import subprocess
import sys

import pytest

import fanformer

SCRIPT = """
import sys
import fanformer
assert {"FANformerConfig", "FANformerForCausalLM", "FANformerModel"} <= set(dir(fanformer))
heavy = {"torch", "transformers", "numpy", "click", "fanformer.model"} & set(sys.modules)
assert not heavy, heavy
from fanformer import FANformerConfig
from fanformer.model import FANformerConfig as the_same
assert FANformerConfig is the_same
"""


def test_importing_the_package_imports_nothing_heavy_until_a_class_is_asked_for():
    done = subprocess.run([sys.executable, "-c", SCRIPT], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr


def test_every_public_name_is_there_and_others_are_not():
    namespace = {}
    exec("from fanformer import *", namespace)
    for name in fanformer.__all__:
        assert namespace[name] is getattr(fanformer, name)
    with pytest.raises(AttributeError, match="module 'fanformer' has no attribute 'FANformerConfi'"):
        _ = fanformer.FANformerConfi
