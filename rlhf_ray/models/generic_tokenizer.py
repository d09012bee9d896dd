"""A tokenizer that is all in its tokenizer.json, for folders whose model would give it another class.

This file is self-contained on purpose: `models/folders.py` copies it beside such a tokenizer. It is read only with
`trust_remote_code=True`; without, naming it is enough for Transformers to take its own generic class.
"""

from __future__ import annotations

from transformers import PreTrainedTokenizerFast


class GenericTokenizer(PreTrainedTokenizerFast):
    """Splits, numbers and joins as tokenizer.json says, whatever the model beside it is."""
