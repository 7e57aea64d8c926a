"""The picture of the block is that of the default."""

import importlib.util

from fanformer.model import FANformerConfig


def test_committed_picture_is_what_the_default_gives(repository):
    spec = importlib.util.spec_from_file_location("diagram", repository / "benchmarks" / "diagram.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    picture = module.diagram(FANformerConfig())
    committed = (repository / "docs" / "block.svg").read_text(encoding="utf-8")
    assert committed == picture, "run python benchmarks/diagram.py"
    assert "rank 384" in picture
    assert "rank 96" in module.diagram(FANformerConfig(o_rank=96))
