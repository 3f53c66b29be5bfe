"""Where everything lies in the adapter store's root folder.

incoming/<random>/         uploads being received
raw/<digest>/              what tenants uploaded and the gate accepted: config and weights
published/<key>/           what the gate made of it; can be made again from raw
names/<quoted name>.json   which content is served under a name, with its versions
ids                        the next number by which vLLM may know an adapter
audit/                     who changed what, and when
exam/                      what exams found of published copies, and what they ask
serving.json               what the servers say of how they serve it
mirror                     address of the bucket that decides, if there is one
"""

from __future__ import annotations

import os
from pathlib import Path

INCOMING, RAW, PUBLISHED, NAMES, IDS, AUDIT = "incoming", "raw", "published", "names", "ids", "audit"
EXAM = "exam"
SERVING = "serving.json"
MIRROR = "mirror"
DEFAULT_ROOT = "$XDG_DATA_HOME/safelora-vllm, or ~/.local/share/safelora-vllm"  # for people
FOLDERS = (INCOMING, NAMES, PUBLISHED, RAW)  # of which all that is served is made


def default_root() -> Path:
    """`DEFAULT_ROOT`: the second folder where the variable is not set or empty."""
    data = os.environ.get("XDG_DATA_HOME") or Path.home() / ".local" / "share"
    return Path(data) / "safelora-vllm"
