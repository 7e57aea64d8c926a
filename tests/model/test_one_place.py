"""A switch is known in few places: adding or deleting one is a change of those, and of nothing else."""

import ast
import re

from transformers import LlamaConfig

from fanformer.model import FANformerConfig

TRAINED_ONLY = {"dropout", "embedding_initializer_range"}
"""Fields whose names are words of training too."""
CHOOSE_VALUES = {"model/convert_published.py", "comparison/architectures.py", "cli/train.py"}
"""Files that give fields values, as presets do: published models, architectures of comparisons, an option."""
AT_MOST = 4


def words_of_code(source):
    """Return the words of a file but for those of comments and docstrings."""
    tree = ast.parse(source)
    for node in ast.walk(tree):
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant):
            node.value.value = ""
    return set(re.findall(r"\w+", ast.unparse(tree)))


def test_a_switch_is_known_in_at_most_the_four_places_that_contributing_names(repository):
    section = (repository / "CONTRIBUTING.md").read_text(encoding="utf-8").split("## Adding a switch")[1]
    named = {name for name in re.findall(r"`(\w+/\w+\.py)`", section) if not name.startswith("tests/")}
    assert {"model/configuration_fanformer.py", "model/modeling_fanformer.py"} < named
    assert len(named) <= AT_MOST
    sources = repository / "src" / "fanformer"
    words = {
        str(path.relative_to(sources)): words_of_code(path.read_text(encoding="utf-8"))
        for path in sources.rglob("*.py")
    }
    llama = set(LlamaConfig().to_dict())
    switches = (FANformerConfig.__annotations__.keys() - llama - TRAINED_ONLY) | {"hidden_act"}
    assert len(switches) > 12
    for switch in sorted(switches):
        knowing = {name for name, found in words.items() if switch in found} - CHOOSE_VALUES
        assert knowing <= named, f"`{switch}` is known in {', '.join(sorted(knowing - named))}, too"
