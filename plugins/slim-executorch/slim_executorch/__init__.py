"""The hook of the plugin. ExecuTorch is imported when a model is first converted."""

from __future__ import annotations

import slimcli


@slimcli.hookimpl
def slim_runtimes():
    from slim_executorch.runtime import ExecuTorch

    return [ExecuTorch]
