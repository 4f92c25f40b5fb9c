"""`xceptile sign`: a signature over a bundle's manifest."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .common import BundleArgument, out


def sign(
    bundle: BundleArgument,
    key: Annotated[Path, typer.Option(help="An Ed25519 private key in PEM form.")],
) -> None:
    """Sign a bundle; the verbs that read one check the signature with --public-key."""
    from ...runtime.bundle import sign_bundle
    from ...runtime.signature import SIGNATURE, load_signer

    sign_bundle(bundle, load_signer(key))
    out.print(f"{bundle / SIGNATURE}: written")
