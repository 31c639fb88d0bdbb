"""Converting a model of 8 GB beside copying its files: time, and the memory that it takes.

    python benchmarks/convert.py [FOLDER]

FOLDER (default: the system's temporary folder) must have 26 GB free; what is written there is removed. Every figure is
of a whole process that ends with its output on the disk. The copy is the peer: the same bytes, and nothing but that.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import ml_dtypes
import numpy as np

from qwen_jax import zoo
from qwen_jax.weights import hf, hf_config
from qwen_jax.weights.safetensors import SafetensorsWriter
from qwen_jax.weights.sinks import default_layout
from qwen_jax.weights.tensors import TensorInfo

COPY = "import os, shutil, sys; shutil.copytree(sys.argv[1], sys.argv[2]); os.sync()"
