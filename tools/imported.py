"""Everything that the commands import, for the process that `programs.py` forks them from."""

import os

os.environ["OMP_NUM_THREADS"] = "1"
# As the commands set it before these imports.
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import peft
import transformers.models.llama.modeling_llama
import transformers.pipelines

import edge.generate
import edge.join
import hub.admin
import hub.serve
import hub.store.export

__all__ = ["edge", "hub", "peft", "transformers"]
