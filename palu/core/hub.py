"""Whether the Hugging Face hub can be reached, found out in seconds instead of minutes of retries."""

import functools
import os
import socket
from urllib.parse import urlsplit

PROBE_SECONDS = 3.0


@functools.cache
def hub_reachable() -> bool:
    """True if the hub answers, or if a proxy decides; False when offline or told to be."""
    if os.environ.get("HF_HUB_OFFLINE", "").upper() in ("1", "ON", "YES", "TRUE"):
        return False
    if any(os.environ.get(name) for name in ("HTTPS_PROXY", "https_proxy", "ALL_PROXY", "all_proxy")):
        return True
    endpoint = urlsplit(os.environ.get("HF_ENDPOINT", "https://huggingface.co"))
    port = endpoint.port or (80 if endpoint.scheme == "http" else 443)
    try:
        with socket.create_connection((endpoint.hostname, port), timeout=PROBE_SECONDS):
            return True
    except OSError:
        return False
