"""Where TensorFlow trains: this machine, several workers, one TPU host, or a pod."""

import os
from typing import TYPE_CHECKING, Any

from .errors import UserError, describe
from .report import log

if TYPE_CHECKING:
    import tensorflow as tf

HEALTHY_SECONDS = 600  # a pod that is being created needs minutes


def build_strategy(tpu: str | None, n_devices: int | None = None) -> "tf.distribute.Strategy":
    """The strategy for `--tpu`.

    Args:
        tpu: name of a TPU or pod, "local" (this is its host), "none" or None: no TPU. Without one,
            TF_CONFIG joins the workers that it lists, and otherwise all GPUs or logical CPU
            devices of this machine train together.
        n_devices: of this machine's at most; None: all.
    Raises:
        UserError: the TPU cannot be reached or does not become healthy.
    """
    import tensorflow as tf

    if tpu in (None, "none"):
        if os.environ.get("TF_CONFIG"):
            return tf.distribute.MultiWorkerMirroredStrategy()
        kind = "GPU" if tf.config.list_logical_devices("GPU") else "CPU"
        devices = [device.name for device in tf.config.list_logical_devices(kind)][:n_devices]
        return tf.distribute.MirroredStrategy(devices) if len(devices) > 1 else _single()
    if tpu != "local":
        wait_until_healthy(tpu)
    try:
        resolver = tf.distribute.cluster_resolver.TPUClusterResolver(tpu=tpu)
        if tpu != "local":
            tf.config.experimental_connect_to_cluster(resolver)
        tf.tpu.experimental.initialize_tpu_system(resolver)
    except (tf.errors.OpError, ValueError, RuntimeError) as error:
        raise UserError(
            f"--tpu {tpu} cannot be initialized ({describe(error)}): run this on a TPU host with "
            "the TensorFlow of the TPU's image, or use --tpu none"
        ) from error
    return tf.distribute.TPUStrategy(resolver)


def wait_until_healthy(name: str, timeout_s: int = HEALTHY_SECONDS) -> None:
    """Return when the TPU API says that the pod is ready and healthy.

    Raises:
        UserError: the API cannot be reached, does not know it, or it stays unhealthy.
    """
    client = _tpu_client(name)
    try:
        log(f"waiting for TPU {name} to be healthy (at most {timeout_s / 60:.0f} minutes)")
        client.wait_for_healthy(timeout_s=timeout_s, interval=10)
    except Exception as error:  # whatever Google's client raises, it is the same to the user
        raise UserError(
            f"--tpu {name} cannot be reached ({describe(error)[:200]}): expected the name of a "
            "running TPU in this project and zone; see `gcloud compute tpus tpu-vm list`, or use "
            "--tpu local or --tpu none"
        ) from error


def _tpu_client(name: str) -> Any:
    try:
        from cloud_tpu_client import Client

        return Client(name)
    except Exception as error:
        raise UserError(
            f"--tpu {name}: the Cloud TPU API is not available ({describe(error)[:200]}); use "
            "--tpu local on a TPU host, or --tpu none"
        ) from error


def _single() -> "tf.distribute.Strategy":
    import tensorflow as tf

    return tf.distribute.get_strategy()
