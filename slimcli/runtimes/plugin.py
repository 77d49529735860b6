"""The hook of the built-in runtimes. What they need is imported when they are first used."""

from __future__ import annotations

from typing import TYPE_CHECKING

from slimcli.hookspecs import hookimpl

if TYPE_CHECKING:
    from slimcli.runtimes.base import Runtime


@hookimpl
def slim_runtimes() -> list[type[Runtime]]:
    from slimcli.runtimes.aoti import AotInductor
    from slimcli.runtimes.compiled import Compile
    from slimcli.runtimes.cuda_graph import CudaGraph
    from slimcli.runtimes.eager import Torch
    from slimcli.runtimes.onnx import OnnxRuntime
    from slimcli.runtimes.openvino import OpenVino

    return [Torch, Compile, CudaGraph, AotInductor, OnnxRuntime, OpenVino]
