"""The demo page as a Space on the Hub: `acd-logits demo`, at the address that a Space serves."""

import os
import sys

from acd_logits.cli import main

if __name__ == "__main__":
    host = os.environ.get("GRADIO_SERVER_NAME", "127.0.0.1")  # a Space sets it
    sys.exit(main(["demo", "--host", host, *sys.argv[1:]]))
