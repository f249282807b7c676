"""The TPU compiler in a process of its own: one program in, one JSON file out.

    python3 -m algpt2.tpu.tpu_compiler REQUEST.json

libtpu writes to stderr, aborts on its own errors and may crash when the interpreter exits, so
`dry_run.compile_program` starts this process for it. The request names the serialized HLO module of
one replica (`program`), the slice (`topology`, `chip_config`, `accelerator_type`) and the file to
write (`answer`). The answer holds bytes per core as XLA counts them, FLOPs and seconds; or `error`,
XLA's message.
"""

import json
import os
import sys
import time
from pathlib import Path
from typing import Any

QUIET = {"TPU_MIN_LOG_LEVEL": "3", "TPU_STDERR_LOG_LEVEL": "3", "TPU_LOG_DIR": "disabled"}
# Ask no metadata server for the slice's hosts; open and lock no device.
NO_TPU = {
    "TPU_SKIP_MDS_QUERY": "1", "TPU_WORKER_HOSTNAMES": "localhost", "JAX_PLATFORMS": "cpu",
    "ALLOW_MULTIPLE_LIBTPU_LOAD": "1",
}  # fmt: skip


def compile_request(request: dict[str, Any]) -> dict[str, Any]:
    """Compile the program of `request`; return the fields of `dry_run.Compiled`.

    Raises:
        RuntimeError: libtpu has another number of devices; XLA's errors pass through.
    """
    os.environ.update(QUIET | NO_TPU | {"TPU_ACCELERATOR_TYPE": request["accelerator_type"]})
    from jax._src.interpreters.mlir import make_ir_context
    from jax._src.lib.mlir import ir
    from jax.experimental import topologies
    from jax.extend.mlir import hlo_to_stablehlo

    chip = {"chip_config_name": request["chip_config"]} if request["chip_config"] else {}
    topology = topologies.get_topology_desc(request["topology"], "tpu", **chip)
    devices = list(topology.devices)
    if len(devices) != request["n_devices"]:
        raise RuntimeError(f"expected {request['n_devices']} devices, libtpu has {len(devices)}")
    with make_ir_context():
        module = ir.Module.parse(hlo_to_stablehlo(Path(request["program"]).read_bytes()))
        _drop_copies(module.operation)
        start_s = time.perf_counter()
        executable = _compile(module, devices)
        seconds = time.perf_counter() - start_s
    memory = executable.get_compiled_memory_stats()
    return {
        "argument_bytes": memory.argument_size_in_bytes,
        "output_bytes": memory.output_size_in_bytes,
        "alias_bytes": memory.alias_size_in_bytes,
        "temp_bytes": memory.temp_size_in_bytes,
        "code_bytes": memory.generated_code_size_in_bytes,
        "flops": executable.cost_analysis()["flops"],
        "seconds": seconds,
    }


def _compile(module: Any, devices: list[Any]) -> Any:
    import numpy as np
    from jax._src import compiler
    from jax._src.lib import xla_client

    options = compiler.get_compile_options(
        num_replicas=len(devices),
        num_partitions=1,
        device_assignment=np.array([[device.id] for device in devices]),
    )
    return devices[0].client.compile(
        module, executable_devices=xla_client.DeviceList(tuple(devices)), compile_options=options
    )


def _drop_copies(operation: Any) -> None:
    """Replace each `mhlo.copy` by its operand: the TPU's client does not know that dialect."""
    for region in operation.regions:
        for block in region.blocks:
            for inner in list(block.operations):
                _drop_copies(inner.operation)
                if inner.operation.name == "mhlo.copy":
                    inner.operation.results[0].replace_all_uses_with(inner.operation.operands[0])
                    inner.operation.erase()


def main() -> None:
    """Read the request, write its answer, leave without the interpreter's exit."""
    request = json.loads(Path(sys.argv[1]).read_text(encoding="utf-8"))
    try:
        answer = compile_request(request)
    except Exception as error:  # the other process tells the user
        answer = {"error": f"{type(error).__name__}: {error}"}
    Path(request["answer"]).write_text(json.dumps(answer), encoding="utf-8")
    os._exit(0)


if __name__ == "__main__":
    main()
