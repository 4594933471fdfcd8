"""A bundle as a BentoML service, for `bentoml build`, `bentoml serve` and what is made of them."""

from __future__ import annotations

import logging
import os
import secrets
from pathlib import Path
from typing import TYPE_CHECKING, Any

from moon.runtime.cores import usable_cores
from moon.runtime.predictor import Predictor
from moon.serve.run import read_token
from moon.serve.service import build_service
from moon.serve.settings import Served, Settings

if TYPE_CHECKING:
    import bentoml

__all__ = ["TOKEN_VARIABLE", "bento_service"]

TOKEN_VARIABLE = "MOON_TOKEN_FILE"
_MOST_THREADS = 8
logger = logging.getLogger("moon.serve")


def bento_service(
    bundle: str | os.PathLike[str], *, backend: str = "onnxruntime"
) -> bentoml.Service[Any]:
    """The service, for the module that a bentofile names.

    Clients must send the token in the file that MOON_TOKEN_FILE names. Without one nobody gets in:
    BentoML listens on all addresses, and is not to be asked whether that is meant.

    Args:
        bundle: a calibrated bundle's folder.
        backend: see :data:`moon.runtime.backend.NAMES`.

    Raises:
        UsageError: the token file cannot be read, or holds no token.
        BundleError: the bundle is missing, damaged or not calibrated.
        BackendError: the backend cannot run here.
    """
    path = os.environ.get(TOKEN_VARIABLE)
    token = read_token(Path(path)) if path else None
    if token is None:
        logger.warning("%s is not set, so no client will be let in", TOKEN_VARIABLE)
        token = secrets.token_hex(32)
    predictor = Predictor.open(bundle, backend=backend, warn=logger.warning)
    served = Served(predictor.bundle.manifest.name, os.fspath(bundle))
    settings = Settings(
        served=(served,),
        reload=False,  # a bento does not change
        backend=backend,
        token=token,
        threads=max(1, min(_MOST_THREADS, usable_cores())),
    )
    return build_service({served.name: predictor}, settings)
