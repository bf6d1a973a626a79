"""Everything that the commands import, for the process that `programs.py` forks them from."""

import gc
import os

os.environ["OMP_NUM_THREADS"] = "1"
# As the commands set it before these imports.
os.environ["TRANSFORMERS_VERBOSITY"] = "error"

import peft
import peft.utils.transformers_weight_conversion
import transformers.models.llama.modeling_llama
import transformers.pipelines
from transformers.conversion_mapping import get_checkpoint_conversion_mapping

import edge.generate
import edge.join
import hub.admin
import hub.serve
import hub.store.export

__all__ = ["edge", "hub", "peft", "transformers"]

# What loading a model makes once in each process: a thousand regular expressions.
get_checkpoint_conversion_mapping("llama")

# Each fork would else look through all of this, and so copy the pages that it shares with the others.
gc.collect()
gc.freeze()
