from __future__ import annotations

import json

import pytest


@pytest.fixture
def write(tmp_path):
    """Rows to a JSONL file; its path."""

    def write(*rows, name="data.jsonl"):
        file = tmp_path / name
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return str(file)

    return write
