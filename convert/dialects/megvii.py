"""The names of megvii-model/ShuffleNet-Series, whose ShuffleNet-v1 has native names."""

from collections.abc import Mapping
from typing import Any

from convert.dialects import Dialect

DIALECTS: tuple[Dialect, ...] = ()


def shufflenet(arguments: Mapping[str, Any]) -> tuple[Dialect, ...]:
    """It counts blocks through all stages; of ShuffleNet-v1, which has groups, there is none."""
    if "groups" in arguments:
        return ()
    blocks = [
        (stage, i) for stage, depth in enumerate(arguments["depths"], 2) for i in range(depth)
    ]
    branches = (("branch1", "branch_proj"), ("branch2", "branch_main"))
    return (
        Dialect(
            "megvii",
            "shufflenet",
            renames=(
                ("conv1.{rest}", "first_conv.{rest}"),
                *(
                    (f"stage{stage}.{i}.{ours}.{{rest}}", f"features.{block}.{theirs}.{{rest}}")
                    for block, (stage, i) in enumerate(blocks)
                    for ours, theirs in branches
                ),
                ("conv5.{rest}", "conv_last.{rest}"),
                ("fc.{rest}", "classifier.0.{rest}"),
            ),
            arguments=dict(authors=True),
        ),
    )


# File -> the dialects, where names depend on the constructor's arguments.
MADE = {"shufflenet": shufflenet}
